"""The rows of every client that are held out for its test or validation part."""

from __future__ import annotations

import numpy as np

from pfedmoe_mpi.data.owners import NO_CLIENT, per_client


def hold_out(
    owner: np.ndarray,
    labels: np.ndarray,
    share: float,
    shape: tuple[int, int],
    generator: np.random.Generator,
) -> np.ndarray:
    """Return a mask (n,) of the rows to hold out: `share` of every owner's class; `shape` is (N, classes)."""
    rows = generator.permutation(np.flatnonzero(owner != NO_CLIENT))
    group = owner[rows] * shape[1] + labels[rows]
    count = np.bincount(group, minlength=shape[0] * shape[1])
    take = _stratify(count.reshape(shape), share, generator).ravel()
    order = np.argsort(group, kind="stable")
    place = np.arange(len(rows)) - (np.cumsum(count) - count)[group[order]]
    mask = np.zeros(len(owner), bool)
    mask[rows[order][place < take[group[order]]]] = True
    return mask


def hold_out_last(owner: np.ndarray, share: float, clients: int) -> np.ndarray:
    """Return a mask (n,) of the last rows of each owner: `share` of them, at least one, never all."""
    mask = np.zeros(len(owner), bool)
    for rows in per_client(owner, clients):
        mask[rows[len(rows) - np.clip(int(share * len(rows) + 0.5), 1, len(rows) - 1) :]] = True
    return mask


def _stratify(count: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Return how many rows of `count` (N, classes) to hold out.

    It is `share` of each client's rows, at least one, never all.
    The rows that rounding down leaves go to the largest remainders. Ties are drawn, because otherwise the low
    classes would have all the test rows of small clients. A class gives its only row last.
    """
    total = count.sum(axis=1)
    target = np.clip(np.rint(total * share), 1, np.maximum(total - 1, 0)).astype(np.int64)
    exact = count * share
    base = np.minimum(np.floor(exact).astype(np.int64), np.maximum(count - 1, 0))
    order = (base + 1 >= count) * 2.0 - (exact - base) + 1e-6 * generator.random(count.shape)
    order[count == 0] = np.inf
    rank = order.argsort(axis=1).argsort(axis=1)
    return base + (rank < (target - base.sum(axis=1))[:, None])
