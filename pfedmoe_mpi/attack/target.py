"""The clients and the shared modules that an attack examines."""

from __future__ import annotations

from pfedmoe_mpi.core.parts import Module
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.loop import Loop

KINDS = ("model ", "extractor ", "whole model ")  # of modules that take samples, not representations


def shared_parts(federation: Federation) -> list[str]:
    """Return the modules that take samples and that clients send to the sum, the largest first."""
    method, sizes = federation.method, federation.state_layout.sizes
    payload = method.payload(sizes)
    found = [
        name
        for name, part in method.state().items()
        if isinstance(part, Module)
        and part.kind.startswith(KINDS)
        and name in payload
        and not payload[name].slot
    ]
    return sorted(found, key=lambda name: -sizes[name])


def trained_clients(loop: Loop, *left_out: str) -> list[int]:
    """Return the clients that trained in any round and were not in these lists of its row, ascending."""
    found = set()
    for row in loop.history:
        found |= set(row["cohort"]).difference(*(row.get(name, ()) for name in left_out))
    return sorted(found)
