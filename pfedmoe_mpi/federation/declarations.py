"""What a method declares, checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import get_args, get_type_hints

from pfedmoe_mpi.algorithms.base import Algorithm, Block
from pfedmoe_mpi.config import methods
from pfedmoe_mpi.config.methods import MethodError
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.core.parts import Parts

WEIGHTS = get_args(get_type_hints(Block)["weight"])


def check(method: Algorithm, state: Layout, clients: Sequence[Layout]) -> None:
    """Check the parts, the payload and the answer of a method.

    Raises:
        MethodError: a declaration contradicts another one, or is missing.
    """
    for reason in (*_parts(method), *_payload(method, state.sizes), *_initial(method, state, clients)):
        raise MethodError.at(methods.path(method.task.config.algorithm), None, reason)


def trained(method: Algorithm) -> dict[str, None]:
    """Return the names in the phases of the first cohort's roles, in order."""
    roles = dict.fromkeys(role for _, role in method.cohort(1))
    return dict.fromkeys(name for role in roles for phase in method.phases(role) for name in phase.lr)


def _parts(method: Algorithm) -> Iterator[str]:
    """Yield what is wrong with the names of the parts, with what trains them, and with what answers."""
    state, private = method.state(), method.client_state(0)
    for name in trained(method).keys() - state.keys() - private.keys():
        yield f"phases: '{name}' is no part in state or client_state"
    for name in state.keys() & private.keys():
        yield f"part '{name}' is declared in state and in client_state; rename one of them"
    for name in {**state, **private}:
        if hasattr(Parts, name):
            yield f"part '{name}' has the name of a method of Parts; rename it"
    if all(getattr(type(method), hook) is getattr(Algorithm, hook) for hook in ("predict", "predictor")):
        yield "the class has no method predict, which returns the logits of a client's model"


def _payload(method: Algorithm, sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield what is wrong with the blocks of the payload."""
    copies = type(method).server_update is Algorithm.server_update
    for name, block in method.payload(sizes).items():
        if not isinstance(block, Block):
            yield f"payload: '{name}' is {block!r}, not a Block"
        elif block.weight not in WEIGHTS:
            yield f"payload: '{name}' has weight = {block.weight!r}; use one of {', '.join(WEIGHTS)}"
        elif block.rows != (rows := len(method.task.weight(block.weight, 0))):
            yield f"payload: '{name}' has rows = {block.rows}, but weight = '{block.weight}' needs {rows}"
        elif copies and (block.slot or sizes.get(name) != block.rows * block.size):
            what = "is a slot" if block.slot else "is no part of the state of that size"
            yield f"payload: '{name}' {what}, so override server_update, which copies means into the state"


def _initial(method: Algorithm, state: Layout, clients: Sequence[Layout]) -> Iterator[str]:
    """Yield where `initial` does not name for a private part a part of the same architecture."""
    if type(method).initial is Algorithm.initial:
        return
    for client, layout in enumerate(clients):
        own = _tensors(layout)
        parts = {**_tensors(state), **own}
        for name in own:
            source = method.initial(name, client)
            if source not in parts:
                yield f"initial: '{name}' begins as {source!r}, but the parts are {', '.join(parts)}"
            elif parts[source] != parts[name]:
                yield f"initial: '{name}' begins as '{source}', but they differ in architecture"
            elif source in own and method.initial(source, client) != source:
                yield f"initial: '{name}' begins as '{source}', which begins as another part"


def _tensors(layout: Layout) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Return the names and shapes of the tensors of each part of a joined layout."""
    tensors: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for entry in layout.entries:
        part, _, name = entry.name.partition("/")
        tensors.setdefault(part, []).append((name, entry.shape))
    return tensors
