"""What a member may add to a round's sum: the values that it returned, weighted, scaled or clipped again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from pfedmoe_mpi.algorithms.base import Block
from pfedmoe_mpi.core.fixedpoint import SCALE
from pfedmoe_mpi.federation.round_sum import RoundSum
from pfedmoe_mpi.privacy.client_release import SHORTER

Pieces = Mapping[str, tuple[np.ndarray, np.ndarray]]  # weights (rows,) and integers (rows · size,) by block


def weight(counts: np.ndarray, block: Block, client: int) -> np.ndarray:
    """Return a member's weights (rows,), as declared. `counts`: samples by client and class."""
    own = counts[client]
    rules = {"samples": [own.sum()], "one": [1], "class_samples": own, "class_one": own > 0}
    return np.array(rules[block.weight], np.int64)


def declared(counts: np.ndarray, total: RoundSum, client: int, values: Mapping[str, Tensor]) -> Pieces:
    """Return a contribution, weighted and scaled as declared. `counts`: as of `weight`."""
    found = {}
    cohort = [k for k, _ in total.cohort]
    for name, value in values.items():
        block = total.payload[name]
        own = weight(counts, block, client)
        numbers = value.float().numpy().reshape(block.rows, block.size)
        if block.slot:
            integers = np.ascontiguousarray(numbers).view(np.int32).astype(np.int64)
        else:
            whole = len(cohort) if block.weight.endswith("one") else counts[cohort].sum()
            share = own.astype(float) / float(whole)
            counted = np.where(own[:, None] > 0, numbers, 0.0).astype(float)
            integers = np.rint(counted * (share * 2.0**block.scale)[:, None]).astype(np.int64)
        found[name] = own, integers.ravel()
    return found


def clipped(
    clip: float,
    expected: float,
    payload: Mapping[str, Block],
    state: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
) -> Pieces:
    """Return a contribution whose update of the server's state has at most the norm `clip` (unit = client).

    Args:
        expected: the number of members by which the sum is divided.
        state: the server's part of each block, (rows · size,).
    """
    changes = {name: value.double().reshape(-1) for name, value in values.items()}
    changes = {n: v if payload[n].update else v - state[n].double() for n, v in changes.items()}
    norm = sum(float(change.square().sum()) for change in changes.values()) ** 0.5
    factor = min(1.0, clip / norm if norm else 1.0) * SHORTER * 2.0**SCALE / expected
    return {
        name: (np.ones(payload[name].rows, np.int64), (change * factor).trunc().long().numpy())
        for name, change in changes.items()
    }
