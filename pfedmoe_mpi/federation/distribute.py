"""Data on every rank: opened everywhere, and each client's samples sent to its home rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise

import numpy as np
import torch

from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.batches import SPLITS, Split
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.rows import ranges
from pfedmoe_mpi.data import Dataset, Partition
from pfedmoe_mpi.data.sources.open import open_dataset, print_warnings
from pfedmoe_mpi.errors import DataError
from pfedmoe_mpi.federation import gates
from pfedmoe_mpi.mpi.comm import Comm


def open_everywhere(comm: Comm, settings: Config, *, warn: bool) -> Dataset:
    """Return the data set on every rank; without the rows on the other ranks if rank 0 holds them.

    With `warn` rank 0 prints the data's warnings.

    Raises:
        DataError: on all ranks: the data cannot be used, or a rank opened another file than rank 0.
    """

    def open_source(check: bool) -> Dataset:
        return open_dataset(settings.data, settings.seed, clients=settings.clients, check=check)

    dataset = comm.from_root(lambda: open_source(check=True), "data", Dataset.without_rows)
    distributed = comm.from_root(lambda: dataset.distributed, "data store")
    if warn and comm.rank == 0:
        print_warnings(dataset)
    if not distributed:
        return dataset
    opened = comm.attempt(lambda: open_source(check=False) if comm.rank else dataset, "data of all ranks")
    _check_same(comm, opened, settings)
    return replace(
        opened, vocabulary=dataset.vocabulary
    )  # only rank 0 searched the file for the largest token


def _check_same(comm: Comm, dataset: Dataset, settings: Config) -> None:
    """Compare the labels, which are read in full, and the samples' shape and type on all ranks."""
    digest = sha256(f"{dataset.shape} {dataset.dtype} {dataset.classes}".encode())
    digest.update(dataset.labels.tobytes())
    digests = comm.gather(digest.hexdigest(), "data of all ranks")
    unlike = [str(rank) for rank in range(comm.size) if digests[rank] != digests[0]]
    if unlike:
        ranks = f"rank{'s' if len(unlike) > 1 else ''} {', '.join(unlike)}"
        problem = f"data.path = {settings.data.path} is another file for {ranks} than for rank 0"
        raise DataError(problem, "copy the same file to every host, or use a file system that all share")


class Shards(Mapping[int, dict[str, Split]]):
    """A rank's clients' samples by split, as views of one tensor of samples and one of labels.

    Args:
        clients: the rank's, ascending.
        ends: (clients, splits) int64, where each client's splits end, one after the other.
        whole: all their samples.
    """

    def __init__(self, clients: np.ndarray, ends: np.ndarray, whole: Split) -> None:
        self._place = {client: number for number, client in enumerate(clients.tolist())}
        self._ends = np.concatenate([[0], ends.ravel()])
        self._whole = whole

    def __getitem__(self, client: int) -> dict[str, Split]:
        first = self._place[client] * len(SPLITS)
        ends = self._ends[first : first + len(SPLITS) + 1].tolist()
        return {
            split: self._whole.rows(slice(start, end))
            for split, (start, end) in zip(SPLITS, pairwise(ends), strict=True)
        }

    def __iter__(self) -> Iterator[int]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, client: object) -> bool:
        return client in self._place

    def digests(self) -> np.ndarray:
        """Return SHA-256 over each client's samples and labels as used, (clients, 32) bytes."""
        whole = self._whole
        names = tuple(str(tensor.dtype) for tensor in (whole.x, whole.y))
        x, y = whole.x.cpu().numpy(), whole.y.cpu().numpy()
        digests = np.empty((len(self), 32), np.uint8)
        ends = self._ends.tolist()
        for number in range(len(self)):
            state = sha256()
            first = number * len(SPLITS)
            for start, end in pairwise(ends[first : first + len(SPLITS) + 1]):
                for name, array in zip(names, (x[start:end], y[start:end]), strict=True):
                    state.update(f"{name}{array.shape}".encode())
                    state.update(array.data if end > start else b"")
            digests[number] = np.frombuffer(state.digest(), np.uint8)
        return digests


def distribute(
    comm: Comm,
    dataset: Dataset,
    partition: Partition,
    home: Sequence[int],
    where: torch.device,
    streamed: bool,
) -> Shards:
    """Return this rank's clients' samples by split, on its device or `streamed`; collective.

    Each rank reads them itself, or receives them from rank 0 if that holds all rows.
    """
    keeper = np.asarray(home)
    own = np.flatnonzero(keeper == comm.rank)
    index = _rows(partition, own)
    if dataset.distributed:
        rows = comm.attempt(lambda: dataset.rows(index), "data rows")
    else:
        rows = np.empty((len(index) if comm.rank else 0, *dataset.shape), dataset.dtype)
        outgoing = {rank: rows if rank == comm.rank else np.empty(0, np.uint8) for rank in range(comm.size)}
        if comm.rank == 0:
            numbers = {rank: _rows(partition, np.flatnonzero(keeper == rank)) for rank in outgoing}
            outgoing = {rank: dataset.rows(each) for rank, each in numbers.items()}
            rows = outgoing[0]
        comm.move([(0, rank, outgoing[rank]) for rank in range(1, comm.size)], "data rows")
    whole = Split(torch.from_numpy(rows), torch.from_numpy(dataset.labels[index]), streamed).to(where)
    return Shards(own, _sizes(partition, own).cumsum().reshape(-1, len(SPLITS)), whole)


def reserved(
    comm: Comm, dataset: Dataset, partition: Partition, where: torch.device, streamed: bool
) -> Client:
    """Return the reserved rows as a client, 8 : 2 for training and test; empty on the other ranks."""
    rows, train = partition.reserved, partition.reserved_train
    if comm.rank:
        rows, train = rows[:0], train[:0]
    x, y = comm.attempt(lambda: dataset.rows(rows), "reserved rows"), dataset.labels[rows]
    rows_of = {"train": train, "test": ~train}
    splits = {name: Split.of(x[rows], y[rows], where, streamed) for name, rows in rows_of.items()}
    return Client(seeds.SERVER, {}, torch.empty(0), splits)


def gate_rows(comm: Comm, dataset: Dataset, partition: Partition, seed: int, where: torch.device) -> Split:
    """Return the same rows on every rank, drawn from all clients' test rows; collective."""
    union = np.unique(partition.test.flat)
    generator = seeds.numpy_generator(seed, "gate rows")
    index = np.sort(generator.choice(union, min(gates.ROWS, len(union)), replace=False))
    rows = comm.from_root(lambda: dataset.rows(index), "rows for gates")
    return Split.of(rows, dataset.labels[index], where)


def _sizes(partition: Partition, clients: np.ndarray) -> np.ndarray:
    """Return how many rows each client has in each split, (clients, splits)."""
    return np.stack([getattr(partition, split).sizes[clients] for split in SPLITS], axis=1)


def _rows(partition: Partition, clients: np.ndarray) -> np.ndarray:
    """Return the row numbers of all clients, by client and split."""
    parts = [getattr(partition, split) for split in SPLITS]
    first = np.cumsum([0, *(len(part.flat) for part in parts)])[:-1]
    starts = np.stack([part.offsets[clients] for part in parts], axis=1) + first
    places = ranges(starts.ravel(), _sizes(partition, clients).ravel())
    return np.concatenate([part.flat for part in parts])[places]


def data_digest(comm: Comm, shards: Shards) -> str:
    """Return SHA-256 over every client's samples and labels as used, in client order; collective."""
    parts = comm.gather((np.array([*shards], np.int64), shards.digests()), "data digest")
    order = np.argsort(np.concatenate([clients for clients, _ in parts]))
    return sha256(np.concatenate([own for _, own in parts])[order].tobytes()).hexdigest()
