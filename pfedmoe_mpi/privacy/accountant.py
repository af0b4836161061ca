"""ε of Gaussian mechanisms that are used many times, by Rényi differential privacy (dp-accounting).

Mironov: "Rényi Differential Privacy", CSF 2017; of Poisson samples: Mironov, Talwar, Zhang: "Rényi
Differential Privacy of the Sampled Gaussian Mechanism", arXiv 1908.10530, 2019. Neighbours differ in one
member: a sample or a client, present or not.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from functools import cache

from pfedmoe_mpi.errors import ConfigError

ORDERS = (*(k / 4 for k in range(5, 28)), *range(7, 65), 128, 256, 512, 1024)
TINY = 1e-300  # a δ at which no ε is zero
LEAST = 1e-4  # noise that is tried
PRECISION = 1e-4  # of a noise that is solved for, relative


def check() -> None:
    """Check that dp-accounting is installed.

    Raises:
        ConfigError: it is not.
    """
    try:
        import dp_accounting  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "privacy.noise and privacy.epsilon need the package dp-accounting to compute ε",
            "pip install 'pfedmoe_mpi[privacy]'",
        ) from error


@cache
def curve(noise: float, probability: float) -> tuple[float, ...]:
    """Return the Rényi divergence at each of `ORDERS` of one use of the mechanism.

    Args:
        noise: standard deviation over sensitivity, above 0.
        probability: that a member takes part.
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of orders that it leaves out
    event = GaussianDpEvent(noise)
    if probability < 1:
        event = PoissonSampledDpEvent(probability, event)
    found = []
    for order in ORDERS:
        accountant = RdpAccountant(orders=[order])
        accountant.compose(event)
        # Of one order it computes ε = divergence + log(1 − 1/α) − log(δ·α) / (α − 1).
        epsilon = accountant.get_epsilon(TINY)
        found.append(float(epsilon) - math.log1p(-1 / order) + math.log(TINY * order) / (order - 1))
    return tuple(found)


def epsilon(noise: float, probability: float, steps: int, delta: float) -> float:
    """Return ε at δ of `steps` uses of a mechanism; infinite without noise, 0 without a use.

    The arguments are those of `curve`.
    """
    if not steps or not probability:
        return 0.0
    if not noise:
        return math.inf
    divergences = curve(noise, probability)
    from dp_accounting.rdp import compute_epsilon

    return float(compute_epsilon(ORDERS, [steps * each for each in divergences], delta)[0])


def solve(target: float, delta: float, uses: Iterable[tuple[float, float, int]]) -> float:
    """Return the least noise, to a ten-thousandth, with which no ε of several accounts exceeds a target.

    It is at least `LEAST`.

    Args:
        uses: of each account: sensitivity, probability and steps.
    """
    noise = LEAST
    for sensitivity, probability, steps in uses:
        low = high = noise
        while epsilon(high / sensitivity, probability, steps, delta) > target:
            low, high = high, 2 * high
        while high - low > PRECISION * high:
            middle = (low + high) / 2
            enough = epsilon(middle / sensitivity, probability, steps, delta) <= target
            low, high = (low, middle) if enough else (middle, high)
        noise = high
    return noise
