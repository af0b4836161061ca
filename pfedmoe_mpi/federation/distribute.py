"""Data on every rank: opened, fitted, and handed to the clients' homes."""

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
from pfedmoe_mpi.data.sources.open import open_dataset
from pfedmoe_mpi.mpi.comm import Comm


def open_everywhere(comm: Comm, settings: Config) -> Dataset:
    """Return the data set on every rank; where rank 0 holds the rows, the others get all but the rows."""

    def opened(check: bool) -> Dataset:
        return open_dataset(settings.data, settings.seed, clients=settings.clients, check=check)

    dataset = comm.from_root(lambda: opened(check=True), "data", Dataset.without_rows)
    distributed = comm.from_root(lambda: dataset.distributed, "data store")
    if not distributed:
        return dataset
    return comm.attempt(lambda: opened(check=False) if comm.rank else dataset, "data of all ranks")


def distribute(
    comm: Comm, dataset: Dataset, partition: Partition, home: Sequence[int], where: torch.device
) -> dict[int, dict[str, Split]]:
    """Every client's samples on its home's device: read there, or sent by the root that holds them."""
    wanted = {
        rank: np.concatenate(
            [np.empty(0, np.int64), *_rows(partition, [k for k, r in enumerate(home) if r == rank])]
        )
        for rank in range(comm.size)
    }
    if dataset.distributed:
        rows = comm.attempt(lambda: dataset.rows(wanted[comm.rank]), "data rows")
    else:
        rows = np.empty((len(wanted[comm.rank]), *dataset.shape), dataset.dtype)
        if comm.rank == 0:
            outgoing = {rank: dataset.rows(index) for rank, index in wanted.items()}
            rows = outgoing[0]
        else:
            outgoing = {rank: rows if rank == comm.rank else np.empty(0, np.uint8) for rank in wanted}
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
    """The reserved rows as a client of the server's, 8 : 2 for training and test; only rank 0 reads them."""
    rows, train = partition.reserved, partition.reserved_train
    if comm.rank:
        rows, train = rows[:0], train[:0]
    x, y = comm.attempt(lambda: dataset.rows(rows), "reserved rows"), dataset.labels[rows]
    splits = {"train": Split.of(x[train], y[train], where), "test": Split.of(x[~train], y[~train], where)}
    return Client(seeds.SERVER, {}, torch.empty(0), splits)


def _rows(partition: Partition, clients: Sequence[int]) -> list[np.ndarray]:
    return [getattr(partition, split)[client] for client in clients for split in SPLITS]


def data_digest(comm: Comm, clients: Mapping[int, Client]) -> str:
    """SHA-256 over every client's samples and labels as used, in client order."""
    own = {}
    for k, client in clients.items():
        state = sha256()
        for split in client.splits.values():
            for tensor in (split.x, split.y):
                state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                state.update(tensor.cpu().numpy().tobytes())
        own[k] = state.digest()
    all_clients: dict[int, bytes] = {}
    for part in comm.gather(own, "data digest"):
        all_clients |= part
    return sha256(b"".join(all_clients[k] for k in sorted(all_clients))).hexdigest()
