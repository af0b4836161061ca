"""How a fork begins: with every part of the checkpoint that its changed settings still have.

Parts that only the checkpoint has end there. Parts that only the fork has begin as in a new run: with drawn
values, or with those of another part (`Algorithm.initial`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation import initial_values, rebuilt
from pfedmoe_mpi.federation.federation import Federation


def check(federation: Federation, loaded: Checkpoint) -> list[str]:
    """Return a line on the parts that end, and one on those that begin, where there are any.

    Raises:
        ConfigError: a part would have another architecture than in the checkpoint, or no part is common.
    """
    ended, begun, common = set(), set(), set()
    for before, now in _pairs(federation, loaded):
        ended |= before.parts.keys() - now.parts.keys()
        begun |= now.parts.keys() - before.parts.keys()
        for name in before.parts.keys() & now.parts.keys():
            common.add(name)
            if before.part(name).digest != now.part(name).digest:
                raise ConfigError(
                    f"with these settings '{name}' has another architecture than in {loaded.path}",
                    "change only settings that leave the architecture of models and gates as it is",
                )
    if not common and ended:
        problem = f"with these settings no part of a model is one of {loaded.path}"
        raise ConfigError(problem, "choose a method that trains parts of the same names, or start a new run")
    lines = {"parts of the run that the fork does not have": ended, "parts that begin with the fork": begun}
    return [f"{what}: {', '.join(sorted(names))}" for what, names in lines.items() if names]


def begin(federation: Federation, state: torch.Tensor, loaded: Checkpoint) -> list[int]:
    """Copy the common parts into the server's vector, and leave the clients' where they are; not collective.

    A client's vector is read from the run's checkpoint whenever it is asked for. So the fork's first
    checkpoint, which holds all of them, is written from one vector after the other.

    Returns:
        the clients of all ranks whose vectors are not those that a new run would draw.
    """
    _copy(loaded.state_layout, torch.from_numpy(loaded.state), federation.state_layout, state)
    initial_values.begin_private_parts(federation, state)
    chosen = loaded.trained if _drawn_alike(federation, loaded) else list(range(loaded.clients))
    vector, layouts = rebuilt.vectors(loaded), federation.client_layouts

    def read(client: int) -> torch.Tensor:
        values = federation.beginning.vector(client)
        _copy(loaded.layout(client), torch.from_numpy(vector(client)), layouts[client], values)
        return values

    own = (client for client in chosen if client in federation.clients and layouts[client].size)
    federation.store.rely(own, read)
    return chosen


def _drawn_alike(federation: Federation, loaded: Checkpoint) -> bool:
    """Return whether the run drew the common parts of a client that never trained as a new run does."""
    begins = type(federation.method).initial is not Algorithm.initial or len(loaded.first_state)
    return not begins and not loaded.code


def _pairs(federation: Federation, loaded: Checkpoint) -> Iterator[tuple[Layout, Layout]]:
    """Yield the layouts of the server and of every client: the checkpoint's and the fork's."""
    yield loaded.state_layout, federation.state_layout
    for client, layout in enumerate(federation.client_layouts):
        yield loaded.layout(client), layout


def _copy(before: Layout, old: torch.Tensor, now: Layout, new: torch.Tensor) -> None:
    """Copy the parts that both vectors have."""
    for name in before.parts.keys() & now.parts.keys():
        new[now.parts[name]] = old[before.parts[name]]
