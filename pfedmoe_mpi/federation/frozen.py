"""The frozen tensors of a federation: drawn or read before round 1; at a restart, those of the run folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from pfedmoe_mpi.algorithms.base import Task
from pfedmoe_mpi.checkpoint import Checkpoint, frozen
from pfedmoe_mpi.checkpoint.frozen import Frozen
from pfedmoe_mpi.core import tail
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.core.parts import Spec, Workbench, modules_by_kind
from pfedmoe_mpi.core.tail import Tail
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.models import generators
from pfedmoe_mpi.mpi.comm import Comm


def load(
    comm: Comm, bench: Workbench, specs: tuple[Spec, Sequence[Spec]], loaded: Checkpoint | None
) -> Frozen:
    """Return the frozen tensors of all parts; collective. With a checkpoint set those of its run folder.

    This is where every architecture is built on every rank for the first time.

    Args:
        specs: of the server and of every client.

    Raises:
        CheckpointError: on all ranks: those of the checkpoint are missing, damaged or of other models.
        ConfigError: on all ranks: a model of the user's own cannot be built on one of them.
    """
    state, clients = specs
    modules = modules_by_kind((state, *clients))
    layouts = comm.attempt(lambda: {k: bench.frozen_layout(part) for k, part in modules.items()}, "models")
    layouts = {kind: layout for kind, layout in layouts.items() if layout.size}
    digest = loaded.identity.get("frozen") if loaded else None
    if loaded and digest:
        stored = comm.attempt(lambda: frozen.read(loaded.path, digest), "frozen tensors")
        if stored.layouts != layouts:
            problem = f"the models have other frozen tensors than those of {loaded.path}"
            raise CheckpointError(problem, "use the code of the run: --run.code RUN_DIR/code")
        for kind, vector in stored.vectors.items():
            bench.set_frozen(kind, torch.from_numpy(vector))
    vectors = {kind: bench.frozen(modules[kind]).cpu().numpy() for kind in layouts}
    private = {name: [spec[name].kind for spec in clients] for name in (clients[0] if layouts else ())}
    return Frozen(
        layouts,
        vectors,
        {name: part.kind for name, part in state.items() if part.kind in layouts},
        {name: _period(kinds) for name, kinds in private.items() if set(kinds) & layouts.keys()},
    )


def find_tails(task: Task, specs: Iterable[Spec]) -> dict[str, Tail]:
    """Return the tails of models and extractors whose frozen outputs are kept, by kind."""
    if not task.config.model.keep_outputs:
        return {}
    with generators.kept():
        parts = {kind: part for kind, part in modules_by_kind(specs).items() if part.architecture}
        frozen_parts = {kind: part for kind, part in parts.items() if Layout.of(part.skeleton(), True).size}
        built = {kind: part.build() for kind, part in frozen_parts.items()}
    tried = {kind: tail.find(module, task.shape, task.vocabulary) for kind, module in built.items()}
    return {kind: found for kind, found in tried.items() if found}


def _period(kinds: list[str]) -> list[str]:
    """Return the shortest beginning of a list that gives the list when it is repeated."""
    for n in range(1, len(kinds)):
        if all(kind == kinds[k % n] for k, kind in enumerate(kinds)):
            return kinds[:n]
    return kinds
