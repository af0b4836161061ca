"""The integer sum, which makes a mean independent of the order and the ranks on which it is summed.

A contribution is round(w·v·2^s) as int64, with w·v in float64. w is the client's share of the cohort and is
known before training, so a lost client changes only the total of the weights, not the other contributions.
Integers add up to the same bits in any order. The mean is total / Σw in float64, rounded once to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 40  # bits after the point


class NotFiniteError(ValueError):
    """A contribution with NaN or infinity, or one too large for the integer range."""


def encode(value: Tensor, weight: Tensor, total: int, scale: int = SCALE) -> Tensor:
    """Return round(weight/total · value · 2^scale).

    Args:
        value: float32 (rows, size).
        weight: int64 (rows,), 0 ≤ weight ≤ total.
        total: the cohort's weight, so that the shares of all contributions add up to at most 1.

    Returns:
        int64 (rows, size).

    Raises:
        NotFiniteError: a contributed value is not finite or too large. This is checked before the conversion,
            because torch turns NaN and overflow into INT64_MIN.
    """
    share = (weight.double() / total).unsqueeze(1)
    scaled = value.double().mul_(share * 2.0**scale)
    rows = weight > 0
    if not bool(rows.all()):
        scaled[~rows] = 0.0  # a row of weight 0 may hold anything, even NaN
    # Shares add up to at most 1, so totals stay below 2^62 if every value does.
    largest = float(value[rows].abs().max()) if bool(rows.any()) and value.shape[1] else 0.0
    if not largest * 2.0**scale < 2.0**62:
        raise NotFiniteError("a value is not finite or too large for the sum")
    return scaled.round_().to(torch.int64)


def decode(total_value: Tensor, total_weight: Tensor, total: int, scale: int = SCALE) -> Tensor:
    """Return the weighted mean, float32 (rows, size); rows of zero weight are NaN.

    Args:
        total_value: the sum of encoded contributions, int64 (rows, size).
        total_weight: the sum of their weights, int64 (rows,).
        total: as in `encode`.
    """
    share = (total_weight.double() / total).unsqueeze(1)
    return (total_value.double() * 2.0**-scale / share).float()
