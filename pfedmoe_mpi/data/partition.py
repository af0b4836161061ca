"""Which rows belong to which client, and to its training, validation or test part.

A partition is a pure function of the settings, the labels and the seed, so every rank computes it by itself.
Draws are bounded: what cannot be met ends in an error that says which numbers to change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np

from pfedmoe_mpi.config.sections import PartitionSettings
from pfedmoe_mpi.core.seeds import numpy_generator
from pfedmoe_mpi.errors import PartitionError

NOBODY = -1  # owner of a row that is dealt to no client


@dataclass(frozen=True, eq=False)
class Partition:
    """Row numbers per client, ascending int64; no row is in two places.

    `unseen` are clients that never train, `reserved` rows that no client has.
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
        """Which of the reserved rows the server trains on, (reserved,) bool: 8 of 10."""
        return np.arange(len(self.reserved)) % 5 != 4

    def trainers(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(training rows, all rows) of every client, then of the server, if rows are reserved for it."""
        for train, *rest in zip(self.train, self.validation, self.test, strict=True):
            yield train, np.concatenate([train, *rest])
        if len(self.reserved):
            yield self.reserved[self.reserved_train], self.reserved

    def counts(self, labels: np.ndarray, classes: int) -> np.ndarray:
        """Training samples per client and class, (N, classes) int64."""
        return np.stack([np.bincount(labels[rows], minlength=classes) for rows in self.train])

    def check(self) -> None:
        """Assert that no row is in two places: pretraining, training and unseen clients share none."""
        rows = np.concatenate([self.reserved, *self.train, *self.validation, *self.test])
        assert len(np.unique(rows)) == len(rows), "a row is in two places"
        assert self.unseen < set(range(self.clients))

    def digest(self) -> str:
        """SHA-256 over all row numbers and their places, in hexadecimal."""
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
    """Deal rows with `labels` (n,) in 0..classes-1 to `clients` clients.

    Kinds:

    - `iid`: all rows shuffled and cut into equal parts.
    - `pathological`: every client gets exactly `settings.classes` classes, each class goes to as many clients
      (one more or less where it does not divide), with shares drawn from U(0.4, 0.6) and normalised
      (pFedMoE, arXiv 2402.01350, as in its authors' released code). Which client gets which classes is drawn.
    - `dirichlet`: every client draws its class proportions from Dirichlet(alpha); each class is dealt in
      proportion to what the clients drew of it (same paper, practical non-IID). Sizes are thus alike at any
      alpha, unlike when every class draws shares over clients.
    - `classes`: every client draws its number of classes from classes_min..classes, then as `pathological`.
    - `natural`: `client` (n,) tells.

    In `pathological` and `classes` every class goes to somebody where the clients together have room for all;
    else classes drawn by nobody are left out.

    Within each client `test_fraction` of the rows, the same share of each class as nearly as whole rows
    allow, is the test part, and `validation` of the rest the validation part; training and test have one row
    at least. With `pool` official, and in `natural` wherever there is one, the test part is what
    `official_test` (n,) marks; for the other kinds both pools are dealt with the same shares. Of `ordered`
    rows the validation part is the last of a client's training rows. `min_samples` counts all its rows.

    Raises:
        PartitionError: the numbers cannot be met, or were not in `settings.tries` draws.
    """
    official = official_test if settings.kind == "natural" or settings.pool == "official" else None
    if settings.kind == "natural":
        owner, generator = _natural(settings, client, clients, seed)
    else:
        _check(settings, len(labels), classes, clients, official)
        owner, generator = _deal(settings, labels, (clients, classes), seed, official)
    if official is None:
        test = _hold_out(owner, labels, settings.test_fraction, (clients, classes), generator)
    else:
        test = official
        _check_parts(owner, test, clients)
    rest = np.where(test, NOBODY, owner)
    if settings.validation and ordered:
        validation = _last(rest, settings.validation, clients)
    elif settings.validation:
        validation = _hold_out(rest, labels, settings.validation, (clients, classes), generator)
    else:
        validation = np.zeros(len(labels), bool)
    return Partition(
        train=_per_client(np.where(validation, NOBODY, rest), clients),
        validation=_per_client(np.where(validation, owner, NOBODY), clients),
        test=_per_client(np.where(test, owner, NOBODY), clients),
    )


def _check(
    settings: PartitionSettings, rows: int, classes: int, clients: int, official: np.ndarray | None
) -> None:
    """What needs no draw to be seen impossible."""
    if settings.pool == "official" and (official is None or not 0 < official.sum() < rows):
        raise PartitionError(
            "partition.pool official needs data with training and test rows of their own, these have none",
            "set --partition.pool all",
        )
    if settings.kind in {"pathological", "classes"} and settings.classes > classes:
        raise PartitionError(
            f"partition.classes is {settings.classes}, but the data have {classes} classes",
            f"set --partition.classes to {classes} or less",
        )
    least = settings.min_samples
    if clients * least > rows:
        raise PartitionError(
            f"{clients} clients of partition.min_samples {least} need {clients * least} rows, "
            f"the data have {rows}",
            f"set --clients to {rows // least} or less"
            + (f", or --partition.min_samples to {rows // clients}" if rows >= 2 * clients else ""),
        )


def _natural(
    settings: PartitionSettings, client: np.ndarray | None, clients: int, seed: int
) -> tuple[np.ndarray, np.random.Generator]:
    if client is None:
        raise PartitionError(
            "partition.kind natural needs data that say which client a row is from, these do not",
            "set --partition.kind to dirichlet, pathological, classes or iid",
        )
    sizes = np.bincount(client)
    if len(sizes) != clients:
        raise PartitionError(
            f"the data have {len(sizes)} natural clients, not {clients}", f"set --clients {len(sizes)}"
        )
    if sizes.min() < settings.min_samples:
        raise PartitionError(
            f"client {sizes.argmin()} has {sizes.min()} rows, below partition.min_samples "
            f"{settings.min_samples}",
            f"set --partition.min_samples to {sizes.min()}"
            if sizes.min() >= 2
            else "leave the client out of the data",
        )
    return client, numpy_generator(seed, "partition")


def _check_parts(owner: np.ndarray, test: np.ndarray, clients: int) -> None:
    for name, marked in (("test", test), ("training", ~test)):
        sizes = np.bincount(owner[marked & (owner != NOBODY)], minlength=clients)
        if not sizes.all():
            raise PartitionError(
                f"client {sizes.argmin()} has no {name} rows among those the data set apart",
                f"give it {name} rows, or leave official_test out of the data",
            )


def _deal(
    settings: PartitionSettings,
    labels: np.ndarray,
    shape: tuple[int, int],
    seed: int,
    official: np.ndarray | None,
) -> tuple[np.ndarray, np.random.Generator]:
    """The owner of every row, and the generator that goes on drawing from there; `shape` is (N, classes)."""
    clients, classes = shape
    masks = [np.ones(len(labels), bool)] if official is None else [~official, official]
    pools = [np.flatnonzero(mask) for mask in masks]
    sizes = np.stack([np.bincount(labels[rows], minlength=classes) for rows in pools])
    reason = ""
    for attempt in range(settings.tries):
        generator = numpy_generator(seed, "partition", attempt)
        if settings.kind == "iid":
            return _deal_evenly(pools, settings, clients, generator), generator
        shares = _draw_shares(settings, classes, clients, generator)
        whole = settings.kind != "dirichlet"
        counts = np.stack([_apportion(size, shares, whole) for size in sizes])
        reason = _misfit(settings, counts, shares, whole)
        if not reason:
            return _assign(pools, labels, counts, generator), generator
    raise PartitionError(
        f"no draw of partition.tries {settings.tries} met the partition: {reason}", _remedy(settings, clients)
    )


def _remedy(settings: PartitionSettings, clients: int) -> str:
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
    """Why `counts` (pools, classes, N) will not do, or nothing; of two pools the first is for training."""
    short = (shares > 0) & (counts[0] == 0)
    if whole and short.any():
        label = int(short.any(axis=1).argmax())
        return f"class {label} has {counts[0, label].sum()} rows for {(shares[label] > 0).sum()} clients"
    total = counts.sum(axis=(0, 1))
    if total.min() < settings.min_samples:
        return f"client {total.argmin()} would have {total.min()} rows, not {settings.min_samples}"
    per_pool = counts.sum(axis=1)
    if len(per_pool) == 2 and not per_pool.all():
        pool, client = np.argwhere(per_pool == 0)[0]
        return f"client {client} would have no {('training', 'test')[pool]} rows"
    return ""


def _draw_shares(
    settings: PartitionSettings, classes: int, clients: int, generator: np.random.Generator
) -> np.ndarray:
    """Shares (classes, N) of each class by client, not yet normalised; a row of zeros is dealt to nobody."""
    if settings.kind == "dirichlet":
        shares = generator.dirichlet(np.full(classes, settings.alpha), clients).T
        shares[shares.sum(axis=1) == 0] = 1.0  # at small alpha all may underflow: then anybody is as good
        return shares
    if settings.kind == "pathological":
        numbers = np.full(clients, settings.classes)
    else:
        numbers = generator.integers(settings.classes_min, settings.classes, clients, endpoint=True)
    held = _draw_classes(numbers, classes, generator)
    return held * generator.uniform(0.4, 0.6, (classes, clients))


def _draw_classes(numbers: np.ndarray, classes: int, generator: np.random.Generator) -> np.ndarray:
    """Who holds what, (classes, N) bool: client k has numbers[k] classes, classes have equally many clients.

    Clients in random order take the classes with the most places left, drawn where these are equal: taking
    the fullest first is what makes the last client's choice always possible (Gale-Ryser).
    """
    clients, total = len(numbers), int(numbers.sum())
    places = np.full(classes, total // classes)
    places[generator.permutation(classes)[: total % classes]] += 1
    held = np.zeros((classes, clients), bool)
    for client in generator.permutation(clients):
        chosen = np.lexsort((generator.random(classes), -places))[: numbers[client]]
        held[chosen, client] = True
        places[chosen] -= 1
    assert not places.any(), "places left over"
    return held


def _apportion(sizes: np.ndarray, shares: np.ndarray, whole: bool) -> np.ndarray:
    """Rows (classes, N) of each class by client, in proportion to `shares`; a class's sum is its size.

    `whole` gives every client with a share one row at least, where there are enough.
    """
    holders = shares > 0
    enough = whole & (sizes >= holders.sum(axis=1))
    first = holders & enough[:, None]
    rest = sizes - first.sum(axis=1)
    edges = np.cumsum(shares, axis=1)
    total = edges[:, -1:]
    edges = np.divide(edges, total, out=np.zeros_like(edges), where=total > 0)
    cuts = np.rint(edges * rest[:, None]).astype(np.int64)
    return first + np.diff(cuts, axis=1, prepend=0)


def _assign(
    pools: list[np.ndarray], labels: np.ndarray, counts: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Owner of every row: each class of each pool shuffled and cut by `counts` (pools, classes, N)."""
    owner = np.full(len(labels), NOBODY, np.int64)
    everybody = np.arange(counts.shape[2])
    for rows, table in zip(pools, counts, strict=True):
        shuffled = generator.permutation(rows)
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
        ends = np.cumsum(np.bincount(labels[rows], minlength=len(table)))
        for count, end in zip(table, ends, strict=True):
            dealt = np.repeat(everybody, count)
            owner[by_class[end - len(dealt) : end]] = dealt
    return owner


def _deal_evenly(
    pools: list[np.ndarray], settings: PartitionSettings, clients: int, generator: np.random.Generator
) -> np.ndarray:
    fewest = [len(pool) // clients for pool in pools]
    if not all(fewest) or sum(fewest) < settings.min_samples:
        raise PartitionError(
            f"{clients} clients would have {' + '.join(map(str, fewest))} rows each (training + test)",
            _remedy(settings, clients),
        )
    owner = np.full(sum(map(len, pools)), NOBODY, np.int64)
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
    """Mask (n,) of the rows each owner gives up: `share` of every class; `shape` is (N, classes)."""
    rows = generator.permutation(np.flatnonzero(owner != NOBODY))
    group = owner[rows] * shape[1] + labels[rows]
    count = np.bincount(group, minlength=shape[0] * shape[1])
    take = _stratified(count.reshape(shape), share, generator).ravel()
    order = np.argsort(group, kind="stable")
    place = np.arange(len(rows)) - (np.cumsum(count) - count)[group[order]]
    mask = np.zeros(len(owner), bool)
    mask[rows[order][place < take[group[order]]]] = True
    return mask


def _last(owner: np.ndarray, share: float, clients: int) -> np.ndarray:
    """Mask (n,) of the last rows of each owner: `share` of them, at least one, never all."""
    mask = np.zeros(len(owner), bool)
    for rows in _per_client(owner, clients):
        mask[rows[len(rows) - np.clip(int(share * len(rows) + 0.5), 1, len(rows) - 1) :]] = True
    return mask


def _stratified(count: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """How many of `count` (N, classes) to hold out: `share` of each client's rows, at least one, never all.

    Largest remainders get the rows that rounding down leaves; ties are drawn, or low classes would have all
    the test rows of small clients; a class gives its only row last.
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
    rows = np.flatnonzero(owner != NOBODY)
    by_client = rows[np.argsort(owner[rows], kind="stable")]
    ends = np.cumsum(np.bincount(owner[rows], minlength=clients))
    return tuple(np.split(by_client, ends[:-1]))
