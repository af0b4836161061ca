"""Shamir's secret sharing: any t of n shares give a secret of 32 bytes, fewer tell nothing about it.

Source: Shamir, How to share a secret, CACM 22(11), 1979. The field is that of the Mersenne prime 2^31 - 1:
its products fit into int64, so a share is a few small integers that anybody can check by hand.
A secret is cut into digits of 30 bits, each the constant term of a polynomial of its own. Coefficients are
64-bit random numbers modulo the prime: no residue is likelier than another by more than 2^-33 of its
probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

PRIME = 2**31 - 1
SECRET = 32  # bytes of a secret
DIGIT = 30  # bits of a digit, so that every digit is below the prime
DIGITS = -(-8 * SECRET // DIGIT)
SHARE = 4 * DIGITS  # bytes of a share


def evaluate(coefficients: np.ndarray, points: np.ndarray, prime: int = PRIME) -> np.ndarray:
    """Return the values of polynomials at points, int64 (points, polynomials), by Horner's rule.

    Args:
        coefficients: int64 (threshold, polynomials), the constant terms first.
        points: int64 (points,).
    """
    values = np.zeros((len(points), coefficients.shape[1]), np.int64)
    for terms in coefficients[::-1]:
        values = (values * points[:, None] + terms) % prime
    return values


@lru_cache(maxsize=64)  # all secrets of a complete graph are opened with shares of the same holders
def weights_at_zero(points: tuple[int, ...], prime: int = PRIME) -> np.ndarray:
    """Return Lagrange's weights, int64 (points,): a polynomial's value at 0 is their sum with its values."""
    x = np.array(points, np.int64)
    above, below = np.ones_like(x), np.ones_like(x)
    for number, point in enumerate(points):
        differences = (point - x) % prime
        differences[number] = 1
        factors = np.full_like(x, point)
        factors[number] = 1
        above, below = above * factors % prime, below * differences % prime
    inverse = np.array([pow(int(value), -1, prime) for value in below], np.int64)
    weights = above * inverse % prime
    weights.flags.writeable = False  # the cache hands out the same array again
    return weights


def at_zero(points: Sequence[int], values: np.ndarray, prime: int = PRIME) -> np.ndarray:
    """Return the values at 0, int64 (polynomials,), of polynomials that have `values` (points, polynomials).

    The points are distinct and not 0; with fewer of them than coefficients the result is unrelated.
    """
    weights = weights_at_zero(tuple(points), prime)
    result: np.ndarray = (weights[:, None] * values % prime).sum(axis=0) % prime
    return result


def split(secret: bytes, threshold: int, points: Sequence[int], random: np.ndarray) -> list[bytes]:
    """Return one share for each point; `threshold` of them give the secret.

    Args:
        secret: 32 bytes.
        points: distinct numbers from 1 to PRIME - 1.
        random: uint64 (threshold - 1, DIGITS), uniform and used for nothing else.
    """
    assert len(secret) == SECRET and random.shape == (threshold - 1, DIGITS)
    number = int.from_bytes(secret, "little")
    digits = [number >> (DIGIT * place) & (1 << DIGIT) - 1 for place in range(DIGITS)]
    coefficients = np.vstack([np.array(digits, np.int64), (random % PRIME).astype(np.int64)])
    return [row.tobytes() for row in evaluate(coefficients, np.array(points, np.int64)).astype("<u4")]


def combine(points: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """Return the secret, 32 bytes, from as many shares as its threshold.

    Raises:
        ValueError: the shares do not belong together, or there are too few. This is noticed almost always.
    """
    values = np.frombuffer(b"".join(shares), "<u4").reshape(len(shares), DIGITS).astype(np.int64)
    digits = at_zero(points, values).tolist()
    number = sum(digit << (DIGIT * place) for place, digit in enumerate(digits))
    if max(digits) >> DIGIT or number >> (8 * SECRET):
        raise ValueError("shares that do not belong together")
    return number.to_bytes(SECRET, "little")
