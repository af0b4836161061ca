"""The owner of every row, drawn by the kind of partition."""

from __future__ import annotations

import numpy as np

from pfedmoe_mpi.config.partition_settings import PartitionSettings
from pfedmoe_mpi.core.rows import Rows
from pfedmoe_mpi.core.seeds import numpy_generator
from pfedmoe_mpi.data.shares import apportion, draw_shares
from pfedmoe_mpi.errors import PartitionError

NO_CLIENT = -1  # owner of a row that no client gets


def draw_owners(
    settings: PartitionSettings,
    labels: np.ndarray,
    shape: tuple[int, int],
    seed: int,
    official: np.ndarray | None,
) -> tuple[np.ndarray, np.random.Generator]:
    """Return the owner of every row, and the generator for further draws; `shape` is (N, classes)."""
    clients, classes = shape
    if settings.kind == "quantity":  # only numbers of rows are drawn: all rows are as of one class
        labels, classes = np.zeros_like(labels), 1
    masks = [np.ones(len(labels), bool)] if official is None else [~official, official]
    pools = [np.flatnonzero(mask) for mask in masks]
    sizes = np.stack([np.bincount(labels[rows], minlength=classes) for rows in pools])
    reason = ""
    for attempt in range(settings.tries):
        generator = numpy_generator(seed, "partition", attempt)
        if settings.kind in {"iid", "shards"}:
            return _assign_evenly(pools, labels, settings, clients, generator), generator
        shares = draw_shares(settings, sizes.sum(axis=0), clients, generator)
        whole = settings.kind in {"pathological", "classes"}
        counts = np.stack([apportion(size, shares, whole) for size in sizes])
        reason = _misfit(settings, counts, shares, whole)
        if not reason:
            return _assign(pools, labels, counts, generator), generator
    raise PartitionError(
        f"none of partition.tries = {settings.tries} draws satisfied the settings; in the last, {reason}",
        _remedy(settings, clients, len(labels)),
    )


def _remedy(settings: PartitionSettings, clients: int, rows: int) -> str:
    """Return the changes of settings that make a draw more likely to fit."""
    steps = [
        f"lower --clients (now {clients})",
        f"lower --partition.min_samples (now {settings.min_samples})",
    ]
    if rows < 2 * clients * settings.min_samples:
        steps.insert(0, f"take more rows (now {rows})")
    if settings.kind in {"dirichlet", "dirichlet_class", "quantity"}:
        steps.insert(0, f"raise --partition.alpha (now {settings.alpha:g})")
        if settings.kind != "dirichlet":  # where sizes differ widely, one draw in hundreds fits
            steps.insert(0, f"raise --partition.tries (now {settings.tries})")
    elif settings.kind == "shards":
        steps.insert(1, f"lower --partition.shards (now {settings.shards})")
    elif settings.kind != "iid":
        steps.insert(1, f"change --partition.classes (now {settings.classes})")
    if settings.pool == "official":
        steps.append("set --partition.pool all")
    return ", ".join(steps[:-1]) + f" or {steps[-1]}"


def _misfit(settings: PartitionSettings, counts: np.ndarray, shares: np.ndarray, whole: bool) -> str:
    """Return why `counts` (pools, classes, N) do not fit, or ""; with two pools the first is for training."""
    short = (shares > 0) & (counts[0] == 0)
    if whole and short.any():
        label = int(short.any(axis=1).argmax())
        return f"class {label} has {counts[0, label].sum()} rows for {(shares[label] > 0).sum()} clients"
    total = counts.sum(axis=(0, 1))
    if total.min() < settings.min_samples:
        return (
            f"client {total.argmin()} has {total.min()} rows, fewer than partition.min_samples = "
            f"{settings.min_samples}"
        )
    per_pool = counts.sum(axis=1)
    if len(per_pool) == 2 and not per_pool.all():
        pool, client = np.argwhere(per_pool == 0)[0]
        return f"client {client} has no {('training', 'test')[pool]} rows"
    return ""


def _assign(
    pools: list[np.ndarray], labels: np.ndarray, counts: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Return the owner of every row: each class of each pool is shuffled and cut by `counts`.

    Args:
        counts: (pools, classes, N).
    """
    owner = np.full(len(labels), NO_CLIENT, np.int64)
    clients = np.arange(counts.shape[2])
    for rows, table in zip(pools, counts, strict=True):
        shuffled = generator.permutation(rows)
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
        ends = np.cumsum(np.bincount(labels[rows], minlength=len(table)))
        for count, end in zip(table, ends, strict=True):
            owners = np.repeat(clients, count)
            owner[by_class[end - len(owners) : end]] = owners
    return owner


def _assign_evenly(
    pools: list[np.ndarray],
    labels: np.ndarray,
    settings: PartitionSettings,
    clients: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Return the owner of every row: each pool is shuffled and cut into equal parts.

    `iid` has a part per client. `shards` sorts the shuffled pool by label, and gives every client the drawn
    number of parts; they are the same places of both pools.
    """
    holders = np.arange(clients)
    if settings.kind == "shards":
        holders = generator.permutation(np.repeat(holders, settings.shards))
    owner = np.full(sum(map(len, pools)), NO_CLIENT, np.int64)
    for pool in pools:
        rows = generator.permutation(pool)
        if settings.kind == "shards":
            rows = rows[np.argsort(labels[rows], kind="stable")]
        owner[rows] = holders[np.arange(len(pool)) * len(holders) // len(pool)]
    sizes = np.stack([np.bincount(owner[pool], minlength=clients) for pool in pools])
    if not sizes.all() or sizes.sum(axis=0).min() < settings.min_samples:
        smallest = sizes[:, np.lexsort((sizes.sum(axis=0), sizes.min(axis=0) > 0))[0]]
        raise PartitionError(
            f"clients = {clients}: a client would get {' + '.join(map(str, smallest))} rows (training + "
            f"test), but partition.min_samples = {settings.min_samples} and every part needs a row",
            _remedy(settings, clients, len(labels)),
        )
    return owner


def per_client(owner: np.ndarray, clients: int) -> Rows:
    """Return the rows of every client, ascending."""
    rows = np.flatnonzero(owner != NO_CLIENT)
    by_client = rows[np.argsort(owner[rows], kind="stable")]
    sizes = np.bincount(owner[rows], minlength=clients)
    return Rows(by_client, np.concatenate([[0], np.cumsum(sizes)]))
