"""The assignment of rows to clients, and to each client's training, validation and test part.

A partition is a pure function of the settings, the labels and the seed, so every rank computes it itself.
The number of draws is bounded. If no draw fits, the error names the settings to change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256

import numpy as np

from pfedmoe_mpi.config.partition_settings import PartitionSettings
from pfedmoe_mpi.core.rows import Rows
from pfedmoe_mpi.core.seeds import numpy_generator
from pfedmoe_mpi.data.held_out import hold_out, hold_out_last
from pfedmoe_mpi.data.owners import NO_CLIENT, draw_owners, per_client
from pfedmoe_mpi.data.split_file import Split
from pfedmoe_mpi.errors import PartitionError


@dataclass(frozen=True, eq=False)
class Partition:
    """Row numbers per client, ascending int64; each row occurs once at most.

    `unseen` are the clients that never train, `reserved` the rows that the server keeps. `client_names` are
    the clients' names, empty if they have none. The parts may be given as any sequences of arrays.
    """

    train: Rows
    validation: Rows
    test: Rows
    unseen: frozenset[int] = frozenset()
    reserved: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    client_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            object.__setattr__(self, name, Rows.of(getattr(self, name)))

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
        cells = self.train.owners * classes + labels[self.train.flat]
        return np.bincount(cells, minlength=self.clients * classes).reshape(self.clients, classes)

    def check(self) -> None:
        """Assert that no row occurs twice, so pretraining, training and unseen clients share no row."""
        parts = (self.train, self.validation, self.test)
        rows = np.concatenate([self.reserved, *(part.flat for part in parts)])
        assert not len(rows) or np.bincount(rows).max() == 1, "a row occurs twice"
        assert self.unseen < set(range(self.clients))

    def digest(self) -> str:
        """Return the SHA-256 over all row numbers, by part and client, in hexadecimal."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = sha256()
        for part in (self.train, self.validation, self.test):
            # Every client's rows follow their number.
            heads = part.offsets[:-1] + np.arange(len(part))
            numbers = np.empty(len(part.flat) + len(part), "<i8")
            numbers[heads] = part.sizes
            numbers[np.arange(len(part.flat)) + part.owners + 1] = part.flat
            digest.update(numbers.data)
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
    split: Split | None = None,
) -> Partition:
    """Assign rows with `labels` (n,) in 0..classes-1 to `clients` clients.

    Kinds:

    - `iid`: all rows shuffled and cut into equal parts.
    - `pathological`: every client gets exactly `settings.classes` classes, and every class goes to the same
      number of clients (one more or less if it does not divide). Their shares of a class are drawn from
      U(0.4, 0.6) and normalised (pFedMoE, arXiv 2402.01350, as in its authors' released code). Which client
      gets which classes is drawn.
    - `dirichlet`: every client draws its class proportions from Dirichlet(alpha), and each class is divided
      in proportion to the clients' draws (same paper, practical non-IID). Clients have similar sizes at any
      alpha.
    - `dirichlet_class`: every class draws its proportions over the clients from Dirichlet(alpha) (Yurochkin
      et al., ICML 2019, arXiv 1905.12022), so that clients differ in size, too. Draws are repeated until
      every client has `min_samples`. With `balance`, classes are divided in their order, and a client that
      has n / N of the n rows gets none of the next ones, as in PFLlib and in NIID-Bench (Li et al., ICDE
      2022, arXiv 2102.02079); without it as in FL-bench. Departure: these round the cuts down, which gives
      the last client a row of nearly every class; here they are rounded to the nearest row.
    - `quantity`: sizes are drawn from Dirichlet(alpha), and the rows of each client at random (NIID-Bench,
      quantity skew).
    - `shards`: the rows are sorted by class and cut into N · `shards` equal pieces, and every client gets
      `shards` of them at random (McMahan et al., AISTATS 2017, arXiv 1602.05629, section 3).
    - `classes`: every client draws its number of classes from classes_min..classes; the rest is as in
      `pathological`.
    - `natural`: `client` (n,) is the owner of every row.
    - `file`: `split` lists the rows of every client, or those of its parts.

    In `pathological` and `classes` every class goes to at least one client if the clients together take
    enough classes. Otherwise the rows of classes that no client drew are not used.

    Within each client, `test_fraction` of the rows is the test part and `validation` of the rest is the
    validation part, each with the same share of every class as nearly as whole rows allow. The training and
    test parts have at least one row. With `pool` = official, and in `natural` if the data have a test part,
    the test part is the rows that `official_test` (n,) marks; for the other kinds both pools are divided with
    the same shares. A part that the `split` lists is as listed. If rows are `ordered`, neighbours overlap:
    only `natural` and `file` may divide them, the test part is then the official one, and the validation part
    is the last of a client's training rows.
    `min_samples` counts all rows of a client.

    Raises:
        PartitionError: the settings cannot be satisfied, or no draw of `settings.tries` satisfied them.
    """
    official = official_test if settings.kind == "natural" or settings.pool == "official" else None
    if split:
        official = _listed_test(settings, split, labels, clients, official)
    if ordered:
        _refuse_overlaps(settings, official)
    if split:
        owner = np.max([split.owner(part, len(labels)) for part in split.parts], axis=0)
        generator = numpy_generator(seed, "partition")
    elif settings.kind == "natural":
        owner, generator = _natural_owners(settings, client, clients, seed)
    else:
        _reject_impossible(settings, len(labels), classes, clients, official)
        owner, generator = draw_owners(settings, labels, (clients, classes), seed, official)
    if official is None:
        test = hold_out(owner, labels, settings.test_fraction, (clients, classes), generator)
    else:
        test = official
        _check_parts(owner, test, clients)
    rest = np.where(test, NO_CLIENT, owner)
    if split and split.validation:
        validation = split.owner(split.validation, len(labels)) != NO_CLIENT
    elif settings.validation and ordered:
        validation = hold_out_last(rest, settings.validation, clients)
    elif settings.validation:
        validation = hold_out(rest, labels, settings.validation, (clients, classes), generator)
    else:
        validation = np.zeros(len(labels), bool)
    return Partition(
        train=per_client(np.where(validation, NO_CLIENT, rest), clients),
        validation=per_client(np.where(validation, owner, NO_CLIENT), clients),
        test=per_client(np.where(test, owner, NO_CLIENT), clients),
        reserved=np.sort(split.reserved) if split else np.empty(0, np.int64),
        client_names=split.names if split else (),
    )


def _refuse_overlaps(settings: PartitionSettings, official: np.ndarray | None) -> None:
    """Refuse to divide neighbours that overlap between clients, or between training and test.

    Raises:
        PartitionError: with the setting that divides them elsewhere.
    """
    if settings.kind not in {"natural", "file"}:
        raise PartitionError(
            f"partition.kind = {settings.kind} would divide windows that overlap, so that some clients train "
            "on the words that others are to predict",
            "set --partition.kind natural",
        )
    if official is None:
        raise PartitionError(
            f"partition.pool = {settings.pool} with partition.kind = {settings.kind} would draw test windows "
            "that overlap training windows, which contain the words to predict",
            "set --partition.pool official, or --partition.kind natural",
        )


def _listed_test(
    settings: PartitionSettings, split: Split, labels: np.ndarray, clients: int, official: np.ndarray | None
) -> np.ndarray | None:
    """Return a mask (n,) of the test rows that a file or the data determine, None if they are to be drawn.

    Raises:
        PartitionError: the split does not fit the data, or settings contradict it.
    """
    split.check(labels)
    _check_official(settings, len(labels), official)
    if split.clients != clients:
        raise PartitionError(
            f"clients = {clients}, but partition.file = {split.path} lists {split.clients} clients",
            f"set --clients {split.clients}, or remove --clients",
        )
    fraction = settings.test_fraction != PartitionSettings.model_fields["test_fraction"].default
    for name, given, listed in (
        ("test_fraction", fraction, split.test),
        ("pool", settings.pool == "official", split.test),
        ("validation", bool(settings.validation), split.validation),
    ):
        if given and listed:
            raise PartitionError(
                f"partition.{name} = {getattr(settings, name)} has no effect: {split.path} lists these rows",
                f"remove --partition.{name}",
            )
    smallest = min(range(clients), key=lambda k: sum(len(part[k]) for part in split.parts))
    rows = sum(len(part[smallest]) for part in split.parts)
    if rows < settings.min_samples:
        raise PartitionError(
            f"client {smallest} of {split.path} has {rows} rows, fewer than partition.min_samples = "
            f"{settings.min_samples}",
            f"set --partition.min_samples {max(2, rows)}",
        )
    return split.owner(split.test, len(labels)) != NO_CLIENT if split.test else official


def _reject_impossible(
    settings: PartitionSettings, rows: int, classes: int, clients: int, official: np.ndarray | None
) -> None:
    """Reject settings that no draw could satisfy."""
    _check_official(settings, rows, official)
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
    if settings.kind == "shards" and clients * settings.shards > rows:
        raise PartitionError(
            f"clients = {clients} with partition.shards = {settings.shards} need {clients * settings.shards} "
            f"rows, but the data have {rows}",
            f"set --partition.shards {rows // clients} or less, or lower --clients",
        )


def _check_official(settings: PartitionSettings, rows: int, official: np.ndarray | None) -> None:
    if settings.pool == "official" and (official is None or not 0 < official.sum() < rows):
        raise PartitionError(
            "partition.pool = official needs data with official training and test rows; these data lack one",
            "set --partition.pool all",
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
