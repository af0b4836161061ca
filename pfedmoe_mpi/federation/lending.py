"""Lending: cohort members are trained away from home to balance a round.

This traffic belongs to the simulator, not to any method.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from pfedmoe_mpi.core.batches import SPLITS, Split
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.store import buffer
from pfedmoe_mpi.mpi.comm import Comm


def lend(comm: Comm, federation: Federation, trainer: Mapping[int, int]) -> dict[int, Client]:
    """Send the vectors and samples of clients that train away from home; collective.

    Until `give_back` the store holds the vectors of the clients that this rank borrows.

    Args:
        trainer: the rank that trains each cohort member.

    Returns:
        the clients that this rank borrows, without their vectors.
    """
    home, rank = federation.home, comm.rank
    borrowed: dict[int, Client] = {}
    transfers = []
    for k in (k for k in sorted(trainer) if trainer[k] != home[k]):
        arrays: list[np.ndarray] = []
        if trainer[k] == rank:
            borrowed[k] = _empty(federation, k)
            arrays = _arrays(borrowed[k])
        elif home[k] == rank:
            arrays = [np.ascontiguousarray(a) for a in _arrays(federation.clients[k])]
        transfers += [(home[k], trainer[k], array) for array in arrays]
    comm.move(transfers, "lending clients")
    where = federation.device.device
    for client in borrowed.values():
        client.splits = {name: split.to(where) for name, split in client.splits.items()}
        federation.store.put(client.id, client.vector)
        client.vector = torch.empty(0)
    return borrowed


def give_back(comm: Comm, federation: Federation, trainer: Mapping[int, int]) -> None:
    """Send the vectors of borrowed clients home, changed or not; collective.

    Args:
        trainer: as for `lend`.
    """
    home, rank, store = federation.home, comm.rank, federation.store
    vectors: dict[int, torch.Tensor] = {}
    for client in sorted(trainer):
        if trainer[client] != home[client] and rank == trainer[client]:
            vectors[client] = store.get(client)
        elif trainer[client] != home[client] and rank == home[client]:
            vectors[client] = buffer(federation.client_layouts[client].size)
    comm.move([(trainer[k], home[k], vector.numpy()) for k, vector in vectors.items()], "returning clients")
    for client, vector in vectors.items():
        if rank == home[client]:
            store.take(client, vector)
        else:
            store.forget(client)


def _empty(federation: Federation, client: int) -> Client:
    """Return a client whose vector and samples are still to be received."""
    dtype = torch.from_numpy(np.empty(0, federation.dataset.dtype)).dtype
    shape = federation.dataset.shape
    lengths = {split: len(getattr(federation.partition, split)[client]) for split in SPLITS}
    splits = {
        split: Split(
            torch.empty((n, *shape), dtype=dtype), torch.empty(n, dtype=torch.int64), federation.streamed
        )
        for split, n in lengths.items()
    }
    vector = torch.empty(federation.client_layouts[client].size)
    return Client(client, federation.method.client_state(client), vector, splits)


def _arrays(client: Client) -> list[np.ndarray]:
    """Return what a client that trains away from home takes along: its vector and samples, on the CPU."""
    samples = [t for split in client.splits.values() for t in (split.x.cpu(), split.y.cpu())]
    return [t.numpy() for t in (client.vector, *samples)]
