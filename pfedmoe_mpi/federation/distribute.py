"""Data on every rank: opened everywhere, and each client's samples sent to its home rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256

import numpy as np
import torch

from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.batches import SPLITS, Split
from pfedmoe_mpi.core.client import Client
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
    dataset = comm.attempt(lambda: open_source(check=False) if comm.rank else dataset, "data of all ranks")
    _check_same(comm, dataset, settings)
    return dataset


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


def distribute(
    comm: Comm, dataset: Dataset, partition: Partition, home: Sequence[int], where: torch.device
) -> dict[int, dict[str, Split]]:
    """Return this rank's clients' samples by split, on its device; collective.

    Each rank reads them itself, or receives them from rank 0 if that holds all rows.
    """
    row_numbers = {
        rank: np.concatenate(
            [np.empty(0, np.int64), *_rows(partition, [k for k, r in enumerate(home) if r == rank])]
        )
        for rank in range(comm.size)
    }
    if dataset.distributed:
        rows = comm.attempt(lambda: dataset.rows(row_numbers[comm.rank]), "data rows")
    else:
        rows = np.empty((len(row_numbers[comm.rank]), *dataset.shape), dataset.dtype)
        if comm.rank == 0:
            outgoing = {rank: dataset.rows(index) for rank, index in row_numbers.items()}
            rows = outgoing[0]
        else:
            outgoing = {rank: rows if rank == comm.rank else np.empty(0, np.uint8) for rank in row_numbers}
        comm.move([(0, rank, outgoing[rank]) for rank in range(1, comm.size)], "data rows")
    shards: dict[int, dict[str, Split]] = {}
    at = 0
    for client in (k for k, rank in enumerate(home) if rank == comm.rank):
        shards[client] = {}
        for split in SPLITS:
            index = getattr(partition, split)[client]
            shards[client][split] = Split.of(rows[at : at + len(index)], dataset.labels[index], where)
            at += len(index)
    return shards


def reserved(comm: Comm, dataset: Dataset, partition: Partition, where: torch.device) -> Client:
    """Return the reserved rows as a client, 8 : 2 for training and test; empty on the other ranks."""
    rows, train = partition.reserved, partition.reserved_train
    if comm.rank:
        rows, train = rows[:0], train[:0]
    x, y = comm.attempt(lambda: dataset.rows(rows), "reserved rows"), dataset.labels[rows]
    splits = {"train": Split.of(x[train], y[train], where), "test": Split.of(x[~train], y[~train], where)}
    return Client(seeds.SERVER, {}, torch.empty(0), splits)


def gate_rows(comm: Comm, dataset: Dataset, partition: Partition, seed: int, where: torch.device) -> Split:
    """Return the same rows on every rank, drawn from all clients' test rows; collective."""
    union = np.unique(np.concatenate(partition.test))
    generator = seeds.numpy_generator(seed, "gate rows")
    index = np.sort(generator.choice(union, min(gates.ROWS, len(union)), replace=False))
    rows = comm.from_root(lambda: dataset.rows(index), "rows for gates")
    return Split.of(rows, dataset.labels[index], where)


def _rows(partition: Partition, clients: Sequence[int]) -> list[np.ndarray]:
    """Return the row numbers of each client and split, in this order."""
    return [getattr(partition, split)[client] for client in clients for split in SPLITS]


def data_digest(comm: Comm, clients: Mapping[int, Client]) -> str:
    """Return SHA-256 over every client's samples and labels as used, in client order; collective."""
    digests = {}
    for k, client in clients.items():
        state = sha256()
        for split in client.splits.values():
            for tensor in (split.x, split.y):
                state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                state.update(tensor.cpu().numpy().tobytes())
        digests[k] = state.digest()
    all_clients: dict[int, bytes] = {}
    for part in comm.gather(digests, "data digest"):
        all_clients |= part
    return sha256(b"".join(all_clients[k] for k in sorted(all_clients))).hexdigest()
