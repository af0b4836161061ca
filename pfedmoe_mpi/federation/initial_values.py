"""First values of clients' private parts: drawn, from a file of weights, or those of another part."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.config import methods
from pfedmoe_mpi.config.methods import MethodError
from pfedmoe_mpi.core.flat import Layout
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


def check_initial(method: Algorithm, state: Layout, clients: Sequence[Layout]) -> None:
    """Check that `initial` names for every private part a part of the same architecture.

    Raises:
        MethodError: it does not.
    """
    if type(method).initial is Algorithm.initial:
        return
    for client, layout in enumerate(clients):
        own = _tensors(layout)
        parts = {**_tensors(state), **own}
        for name in own:
            source = method.initial(name, client)
            if source not in parts:
                reason = f"initial: '{name}' begins as {source!r}, but the parts are {', '.join(parts)}"
            elif parts[source] != parts[name]:
                reason = f"initial: '{name}' begins as '{source}', but they differ in architecture"
            elif source in own and method.initial(source, client) != source:
                reason = f"initial: '{name}' begins as '{source}', which begins as another part"
            else:
                continue
            raise MethodError.at(methods.path(method.task.config.algorithm), None, reason)


def _tensors(layout: Layout) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Return the names and shapes of the tensors of each part of a joined layout."""
    tensors: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for entry in layout.entries:
        part, _, name = entry.name.partition("/")
        tensors.setdefault(part, []).append((name, entry.shape))
    return tensors
