"""The frozen tensors of a federation: drawn or read before round 1; at a restart, those of the run folder."""

from __future__ import annotations

from collections.abc import Sequence

from pfedmoe_mpi.checkpoint import Checkpoint, frozen
from pfedmoe_mpi.checkpoint.frozen import Frozen
from pfedmoe_mpi.core.parts import Module, Spec, Workbench
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.mpi.comm import Comm


def stored(comm: Comm, loaded: Checkpoint | None) -> Frozen | None:
    """Return the frozen tensors of a checkpoint, None if it has none; collective.

    Raises:
        CheckpointError: on all ranks: they are missing or damaged.
    """
    digest = loaded.identity.get("frozen") if loaded else None
    if loaded is None or digest is None:
        return None
    return comm.attempt(lambda: frozen.read(loaded.path, digest), "frozen tensors")


def collect(bench: Workbench, state: Spec, specs: Sequence[Spec], before: Frozen | None) -> Frozen:
    """Return the frozen tensors of all parts.

    Args:
        before: those of the checkpoint, which `bench` holds.

    Raises:
        CheckpointError: the models have other frozen tensors than the checkpoint's.
    """
    modules = {
        part.kind: part for spec in (state, *specs) for part in spec.values() if isinstance(part, Module)
    }
    layouts = {
        kind: layout for kind, part in sorted(modules.items()) if (layout := bench.frozen_layout(part)).size
    }
    if before and before.layouts != layouts:
        problem = "the models have other frozen tensors than the checkpoint's"
        raise CheckpointError(problem, "use the code of the run: --run.code RUN_DIR/code")
    vectors = {kind: bench.frozen(modules[kind]).cpu().numpy() for kind in layouts}
    private = {name: [spec[name].kind for spec in specs] for name in (specs[0] if layouts else ())}
    return Frozen(
        layouts,
        vectors,
        {name: part.kind for name, part in state.items() if part.kind in layouts},
        {name: _period(kinds) for name, kinds in private.items() if set(kinds) & layouts.keys()},
    )


def _period(kinds: list[str]) -> list[str]:
    """Return the shortest beginning of a list that gives the list when it is repeated."""
    for n in range(1, len(kinds)):
        if all(kind == kinds[k % n] for k, kind in enumerate(kinds)):
            return kinds[:n]
    return kinds
