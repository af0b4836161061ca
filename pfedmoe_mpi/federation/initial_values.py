"""First values of clients' private parts: drawn, from a file of weights, or those of another part."""

from __future__ import annotations

import torch

from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.federation.federation import Federation


def begin_private_parts(federation: Federation, server: torch.Tensor) -> list[int]:
    """Let clients begin with values of the server's first vector, where the method says so; not collective.

    Clients that begin with values of a file of weights get their vectors now, because a restart does not read
    the file.

    Returns:
        those clients, on all ranks.
    """
    if type(federation.method).initial is not Algorithm.initial:
        places = federation.state_layout.parts
        federation.beginning.server = {name: server[place].clone() for name, place in places.items()}
        federation.store.forget_drawn()
    filled = {id(spec) for spec in federation.specs if not federation.workbench.draws(spec)}
    begun = [client for client, spec in enumerate(federation.specs) if id(spec) in filled]
    for client in begun:
        if client in federation.clients:
            federation.store.put(client, federation.store.get(client))
    return begun
