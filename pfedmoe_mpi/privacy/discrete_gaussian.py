"""Exact samples of the discrete Gaussian: integers k with probability proportional to exp(−k² / 2σ²).

Canonne, Kamath, Steinke: "The Discrete Gaussian for Differential Privacy", NeurIPS 2020, Algorithms 1 to 3.
Added to a vector of integers of L2 sensitivity Δ, it satisfies Δ²/2σ²-concentrated differential privacy
(Theorem 14), as the continuous Gaussian does. A continuous one is rounded to floats, which leaves traces in
the last bits (Mironov, CCS 2012); here nothing is rounded.

Every decision is whether a uniform u in [0, 1) is below exp(−γ) of a rational γ. Floats decide it where the
first 53 bits of u are further than `MARGIN` from the computed exp(−γ), which has a much smaller error. The
others are decided with 256 more bits of u and 120 decimal digits. So a sample does not depend on how a
processor computes exp, and is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import partial

import numpy as np

MARGIN = 2.0**-36
BITS = 256  # that decide where 53 do not
PIECE = 1 << 18  # samples at a time, because intermediate values take memory
LARGEST = 2.0**54  # σ, so that all integers fit into int64


def sample(sigma: float, size: int, generator: np.random.Generator, margin: float = MARGIN) -> np.ndarray:
    """Return independent samples, int64 (size,).

    Args:
        sigma: σ, above 0 and at most `LARGEST`.
        margin: 1 decides everything with all digits, which is slow.
    """
    assert 0 < sigma <= LARGEST
    pieces = [_piece(sigma, min(PIECE, size - at), generator, margin) for at in range(0, size, PIECE)]
    return np.concatenate([*pieces, np.empty(0, np.int64)])


def _piece(sigma: float, size: int, generator: np.random.Generator, margin: float) -> np.ndarray:
    """Return samples: those of a discrete Laplace distribution that Algorithm 3 accepts."""
    t = int(sigma) + 1
    square = Fraction(sigma) ** 2
    centre = float(square / t)

    def exact(y: np.ndarray, i: int) -> Fraction:
        return (abs(int(y[i])) - square / t) ** 2 / (2 * square)

    found: list[np.ndarray] = []
    missing = size
    while missing:
        y = _laplace(t, int(2.3 * missing) + 8, generator, margin)
        approximate = np.square(np.abs(y).astype(float) - centre) / (2 * sigma * sigma)
        accepted = y[_below_exp(approximate, partial(exact, y), generator, margin)]
        found.append(accepted[:missing])
        missing -= len(found[-1])
    return np.concatenate([*found, np.empty(0, np.int64)])


def _laplace(t: int, proposals: int, generator: np.random.Generator, margin: float) -> np.ndarray:
    """Return samples of the discrete Laplace distribution of scale t (Algorithm 2), fewer than proposed."""
    u = generator.integers(0, t, proposals)
    u = u[_below_exp(u / t, lambda i: Fraction(int(u[i]), t), generator, margin)]
    v = np.zeros(len(u), np.int64)
    going = np.arange(len(u))
    while len(going):
        going = going[_below_exp(np.ones(len(going)), lambda i: Fraction(1), generator, margin)]
        v[going] += 1
    y = u + t * v
    negative = generator.integers(0, 2, len(y)).astype(bool)
    return np.where(negative, -y, y)[~(negative & (y == 0))]


def _below_exp(
    approximate: np.ndarray,
    gamma: Callable[[int], Fraction],
    generator: np.random.Generator,
    margin: float,
) -> np.ndarray:
    """Return bool (n,), each True with probability exp(−γ_i).

    Args:
        approximate: γ in float64, (n,).
        gamma: returns γ_i exactly.
    """
    first = generator.integers(0, 1 << 53, len(approximate))
    distance = np.exp(-approximate) - first * 2.0**-53
    below = distance > 0
    for i in np.flatnonzero(np.abs(distance) <= margin):
        more = int.from_bytes(generator.bytes(BITS // 8), "big")
        below[i] = _exactly_below((int(first[i]) << BITS) + more, gamma(int(i)))
    return below


def _exactly_below(numerator: int, gamma: Fraction) -> bool:
    """Return whether numerator · 2^(−53 − BITS) is below exp(−γ)."""
    with localcontext() as context:
        context.prec = 120
        power = (-Decimal(gamma.numerator) / Decimal(gamma.denominator)).exp()
        return Decimal(numerator) < power * Decimal(1 << (53 + BITS))
