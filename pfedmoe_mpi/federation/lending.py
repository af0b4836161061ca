"""Guests: cohort members trained away from home, to balance a round. The simulator's traffic, no method's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from pfedmoe_mpi.core.batches import SPLITS, Split
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.mpi.comm import Comm


def lend(comm: Comm, federation: Federation, trainer: Mapping[int, int]) -> dict[int, Client]:
    """Send the clients that train away from home, vectors and samples; this rank's guests. Collective.

    Args:
        trainer: the rank that trains each cohort member.
    """
    home, rank = federation.home, comm.rank
    guests: dict[int, Client] = {}
    transfers = []
    for client in (k for k in sorted(trainer) if trainer[k] != home[k]):
        arrays: list[np.ndarray] = []
        if trainer[client] == rank:
            guests[client] = _empty(federation, client)
            arrays = _arrays(guests[client])
        elif home[client] == rank:
            arrays = [np.ascontiguousarray(a) for a in _arrays(federation.clients[client])]
        transfers += [(home[client], trainer[client], array) for array in arrays]
    comm.move(transfers, "lending clients")
    where = federation.device.device
    for guest in guests.values():
        guest.splits = {s: Split(d.x.to(where), d.y.to(where)) for s, d in guest.splits.items()}
    return guests


def give_back(
    comm: Comm, federation: Federation, trainer: Mapping[int, int], guests: Mapping[int, Client]
) -> None:
    """Send the guests' vectors home, changed or not. Collective."""
    home, rank = federation.home, comm.rank
    transfers = []
    for client in sorted(trainer):
        if trainer[client] != home[client] and rank in (trainer[client], home[client]):
            at = guests[client] if trainer[client] == rank else federation.clients[client]
            transfers.append((trainer[client], home[client], at.vector.numpy()))
    comm.move(transfers, "returning clients")


def _empty(federation: Federation, client: int) -> Client:
    dtype = torch.from_numpy(np.empty(0, federation.dataset.dtype)).dtype
    shape = federation.dataset.shape
    lengths = {split: len(getattr(federation.partition, split)[client]) for split in SPLITS}
    splits = {
        split: Split(torch.empty((n, *shape), dtype=dtype), torch.empty(n, dtype=torch.int64))
        for split, n in lengths.items()
    }
    vector = torch.empty(federation.client_layouts[client].size)
    return Client(client, federation.method.client_state(client), vector, splits)


def _arrays(client: Client) -> list[np.ndarray]:
    """What travels with a client that trains away from home."""
    samples = [t for split in client.splits.values() for t in (split.x.cpu(), split.y.cpu())]
    return [t.numpy() for t in (client.vector, *samples)]
