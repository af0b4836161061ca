"""The assignment of rows to clients, and to each client's training, validation and test part.

A partition is a pure function of the settings, the labels and the seed, so every rank computes it itself.
The number of draws is bounded. If no draw fits, the error names the settings to change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np

from pfedmoe_mpi.config.sections import PartitionSettings
from pfedmoe_mpi.core.seeds import numpy_generator
from pfedmoe_mpi.data.shares import apportion, draw_shares
from pfedmoe_mpi.errors import PartitionError

NO_CLIENT = -1  # owner of a row that no client gets


@dataclass(frozen=True, eq=False)
class Partition:
    """Row numbers per client, ascending int64; each row occurs once at most.

    `unseen` are the clients that never train, `reserved` the rows that the server keeps.
    """

    train: tuple[np.ndarray, ...]
    validation: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]
    unseen: frozenset[int] = frozenset()
    reserved: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def clients(self) -> int:
        """The number of clients N."""
        return len(self.train)

    @property
    def reserved_train(self) -> np.ndarray:
        """Mask of the reserved rows that the server trains on, (reserved,) bool: 8 of 10."""
        return np.arange(len(self.reserved)) % 5 != 4

    def trainers(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (training rows, all rows) of every client, then of the server if it has reserved rows."""
        for train, *rest in zip(self.train, self.validation, self.test, strict=True):
            yield train, np.concatenate([train, *rest])
        if len(self.reserved):
            yield self.reserved[self.reserved_train], self.reserved

    def counts(self, labels: np.ndarray, classes: int) -> np.ndarray:
        """Return the training samples per client and class, (N, classes) int64."""
        return np.stack([np.bincount(labels[rows], minlength=classes) for rows in self.train])

    def check(self) -> None:
        """Assert that no row occurs twice, so pretraining, training and unseen clients share no row."""
        rows = np.concatenate([self.reserved, *self.train, *self.validation, *self.test])
        assert len(np.unique(rows)) == len(rows), "a row occurs twice"
        assert self.unseen < set(range(self.clients))

    def digest(self) -> str:
        """Return the SHA-256 over all row numbers, by part and client, in hexadecimal."""
        digest = sha256()
        for part in (self.train, self.validation, self.test):
            for rows in part:
                digest.update(len(rows).to_bytes(8, "little"))
                digest.update(rows.astype("<i8").tobytes())
        if self.unseen or len(self.reserved):
            digest.update(json.dumps([sorted(self.unseen), self.reserved.tolist()]).encode())
        return digest.hexdigest()


def make_partition(
    settings: PartitionSettings,
    labels: np.ndarray,
    classes: int,
    clients: int,
    seed: int,
    *,
    client: np.ndarray | None = None,
    official_test: np.ndarray | None = None,
    ordered: bool = False,
) -> Partition:
    """Assign rows with `labels` (n,) in 0..classes-1 to `clients` clients.

    Kinds:

    - `iid`: all rows shuffled and cut into equal parts.
    - `pathological`: every client gets exactly `settings.classes` classes, and every class goes to the same
      number of clients (one more or less if it does not divide). Their shares of a class are drawn from
      U(0.4, 0.6) and normalised (pFedMoE, arXiv 2402.01350, as in its authors' released code). Which client
      gets which classes is drawn.
    - `dirichlet`: every client draws its class proportions from Dirichlet(alpha), and each class is divided
      in proportion to the clients' draws (same paper, practical non-IID). Clients then have similar sizes at
      any alpha, which is not so if every class draws its shares over the clients.
    - `classes`: every client draws its number of classes from classes_min..classes; the rest is as in
      `pathological`.
    - `natural`: `client` (n,) is the owner of every row.

    In `pathological` and `classes` every class goes to at least one client if the clients together take
    enough classes. Otherwise the rows of classes that no client drew are not used.

    Within each client, `test_fraction` of the rows is the test part and `validation` of the rest is the
    validation part, each with the same share of every class as nearly as whole rows allow. The training and
    test parts have at least one row. With `pool` = official, and in `natural` if the data have a test part,
    the test part is the rows that `official_test` (n,) marks; for the other kinds both pools are divided with
    the same shares. If rows are `ordered`, neighbours overlap: the test part is then the official one, and
    the validation part is the last of a client's training rows. `min_samples` counts all rows of a client.

    Raises:
        PartitionError: the settings cannot be satisfied, or no draw of `settings.tries` satisfied them.
    """
    official = official_test if settings.kind == "natural" or settings.pool == "official" else None
    if ordered and official is None:
        raise PartitionError(
            f"partition.pool = {settings.pool} with partition.kind = {settings.kind} would draw test windows "
            "that overlap training windows, which contain the words to predict",
            "set --partition.pool official, or --partition.kind natural",
        )
    if settings.kind == "natural":
        owner, generator = _natural_owners(settings, client, clients, seed)
    else:
        _reject_impossible(settings, len(labels), classes, clients, official)
        owner, generator = _draw(settings, labels, (clients, classes), seed, official)
    if official is None:
        test = _hold_out(owner, labels, settings.test_fraction, (clients, classes), generator)
    else:
        test = official
        _check_parts(owner, test, clients)
    rest = np.where(test, NO_CLIENT, owner)
    if settings.validation and ordered:
        validation = _hold_out_last(rest, settings.validation, clients)
    elif settings.validation:
        validation = _hold_out(rest, labels, settings.validation, (clients, classes), generator)
    else:
        validation = np.zeros(len(labels), bool)
    return Partition(
        train=_per_client(np.where(validation, NO_CLIENT, rest), clients),
        validation=_per_client(np.where(validation, owner, NO_CLIENT), clients),
        test=_per_client(np.where(test, owner, NO_CLIENT), clients),
    )


def _reject_impossible(
    settings: PartitionSettings, rows: int, classes: int, clients: int, official: np.ndarray | None
) -> None:
    """Reject settings that no draw could satisfy."""
    if settings.pool == "official" and (official is None or not 0 < official.sum() < rows):
        raise PartitionError(
            "partition.pool = official needs data with official training and test rows; these data lack one",
            "set --partition.pool all",
        )
    if settings.kind in {"pathological", "classes"} and settings.classes > classes:
        raise PartitionError(
            f"partition.classes = {settings.classes}, but the data have {classes} classes",
            f"set --partition.classes {classes} or less",
        )
    least = settings.min_samples
    if clients * least > rows:
        raise PartitionError(
            f"clients = {clients} with partition.min_samples = {least} need {clients * least} rows, "
            f"but the data have {rows}",
            f"set --clients {rows // least} or less"
            + (f", or --partition.min_samples {rows // clients}" if rows >= 2 * clients else ""),
        )


def _natural_owners(
    settings: PartitionSettings, client: np.ndarray | None, clients: int, seed: int
) -> tuple[np.ndarray, np.random.Generator]:
    """Return the owner of every row as the data name it, and the generator for the held-out parts."""
    if client is None:
        raise PartitionError(
            "partition.kind = natural needs data that name the client of every row; these data do not",
            "set --partition.kind dirichlet, pathological, classes or iid",
        )
    sizes = np.bincount(client)
    if len(sizes) != clients:
        raise PartitionError(
            f"clients = {clients}, but the data have {len(sizes)} natural clients",
            f"set --clients {len(sizes)}, or --partition.kind dirichlet to divide the rows anew",
        )
    if sizes.min() < settings.min_samples:
        raise PartitionError(
            f"client {sizes.argmin()} has {sizes.min()} rows, fewer than partition.min_samples = "
            f"{settings.min_samples}",
            f"set --partition.min_samples {sizes.min()}"
            if sizes.min() >= 2
            else "remove the client from the data",
        )
    return client, numpy_generator(seed, "partition")


def _check_parts(owner: np.ndarray, test: np.ndarray, clients: int) -> None:
    """Reject an official test part that leaves a client without test rows or without training rows."""
    for name, marked in (("test", test), ("training", ~test)):
        sizes = np.bincount(owner[marked & (owner != NO_CLIENT)], minlength=clients)
        if not sizes.all():
            raise PartitionError(
                f"client {sizes.argmin()} has no {name} rows in the data's official split",
                f"give it {name} rows, or let partition.test_fraction divide all rows: remove official_test "
                "from the HDF5 file, or merge every test/K.npz into train/K.npz",
            )


def _draw(
    settings: PartitionSettings,
    labels: np.ndarray,
    shape: tuple[int, int],
    seed: int,
    official: np.ndarray | None,
) -> tuple[np.ndarray, np.random.Generator]:
    """Return the owner of every row, and the generator for further draws; `shape` is (N, classes)."""
    clients, classes = shape
    masks = [np.ones(len(labels), bool)] if official is None else [~official, official]
    pools = [np.flatnonzero(mask) for mask in masks]
    sizes = np.stack([np.bincount(labels[rows], minlength=classes) for rows in pools])
    reason = ""
    for attempt in range(settings.tries):
        generator = numpy_generator(seed, "partition", attempt)
        if settings.kind == "iid":
            return _assign_evenly(pools, settings, clients, generator), generator
        shares = draw_shares(settings, classes, clients, generator)
        whole = settings.kind != "dirichlet"
        counts = np.stack([apportion(size, shares, whole) for size in sizes])
        reason = _misfit(settings, counts, shares, whole)
        if not reason:
            return _assign(pools, labels, counts, generator), generator
    raise PartitionError(
        f"none of partition.tries = {settings.tries} draws satisfied the settings; in the last, {reason}",
        _remedy(settings, clients),
    )


def _remedy(settings: PartitionSettings, clients: int) -> str:
    """Return the changes of settings that make a draw more likely to fit."""
    steps = [
        f"lower --clients (now {clients})",
        f"lower --partition.min_samples (now {settings.min_samples})",
    ]
    if settings.kind == "dirichlet":
        steps.insert(0, f"raise --partition.alpha (now {settings.alpha:g})")
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
    pools: list[np.ndarray], settings: PartitionSettings, clients: int, generator: np.random.Generator
) -> np.ndarray:
    """Return the owner of every row: each pool is shuffled and cut into equal parts."""
    fewest = [len(pool) // clients for pool in pools]
    if not all(fewest) or sum(fewest) < settings.min_samples:
        raise PartitionError(
            f"clients = {clients} would get {' + '.join(map(str, fewest))} rows each (training + test), but "
            f"partition.min_samples = {settings.min_samples} and every part needs a row",
            _remedy(settings, clients),
        )
    owner = np.full(sum(map(len, pools)), NO_CLIENT, np.int64)
    for pool in pools:
        owner[generator.permutation(pool)] = np.arange(len(pool)) * clients // len(pool)
    return owner


def _hold_out(
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


def _hold_out_last(owner: np.ndarray, share: float, clients: int) -> np.ndarray:
    """Return a mask (n,) of the last rows of each owner: `share` of them, at least one, never all."""
    mask = np.zeros(len(owner), bool)
    for rows in _per_client(owner, clients):
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


def _per_client(owner: np.ndarray, clients: int) -> tuple[np.ndarray, ...]:
    """Return the rows of every client, ascending."""
    rows = np.flatnonzero(owner != NO_CLIENT)
    by_client = rows[np.argsort(owner[rows], kind="stable")]
    ends = np.cumsum(np.bincount(owner[rows], minlength=clients))
    return tuple(np.split(by_client, ends[:-1]))
