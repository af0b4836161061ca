"""The memory that a federation's models take, estimated before any of it is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pfedmoe_mpi.algorithms.base import Algorithm, Task
from pfedmoe_mpi.core import redrawn
from pfedmoe_mpi.core.parts import Workbench, modules_by_kind
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.mpi.memory import shortage


@dataclass(frozen=True)
class Host:
    """What rank 0's host has to hold: `local` ranks, with models there or on GPUs."""

    local: int = 1
    cpu: bool = True

    def needed(self, task: Task, method: Algorithm) -> float:
        """Return bytes: weights, gradients, momenta and a copy of a rank's models, and a client's vector.

        Of models that are drawn again for each client there is another copy.
        Frozen tensors are there once. Layouts are made on the meta device. Activations and samples are not
        counted, and nor are the other clients' vectors, which go to a file where memory is short.
        """
        bench = Workbench(task.config.seed, torch.device("cpu"))
        models = min(task.clients, len(task.pool))
        sizes = [bench.layout(method.client_state(client)).size for client in range(models)]
        bound = sum(set(sizes)) + bench.layout(method.state()).size
        specs = [method.state(), *(method.client_state(client) for client in range(models))]
        kinds = modules_by_kind(specs).values()
        frozen = sum(bench.frozen_layout(part).size for part in kinds)
        drawn = [bench.layout({"": part}).size for part in kinds]
        again = sum(size for size in drawn if size <= redrawn.MOST)
        return 4.0 * self.local * (max(sizes) + frozen + again + (4 if self.cpu else 1) * bound)


def check(task: Task, method: Algorithm, host: Host) -> None:
    """Refuse models that do not fit into the memory of rank 0's host.

    Raises:
        ConfigError: they do not; the message has the setting that makes them fit.
    """
    problem = shortage(host.needed(task, method), host.local)
    if problem:
        raise ConfigError(
            f"the models do not fit (model.dim = {task.dim}): {problem}", _remedy(task, method, host)
        )


def _remedy(task: Task, method: Algorithm, host: Host) -> str:
    """Return a shorter representation that fits."""
    dim = task.dim // 2
    while dim and shortage(_shorter(task, method, dim, host), host.local):
        dim //= 2
    return f"--model.dim {dim} fits" if dim else "use a smaller --model.pool, or a host with more memory"


def _shorter(task: Task, method: Algorithm, dim: int, host: Host) -> float:
    """Return the bytes that are needed with a representation of `dim` numbers."""
    settings = task.config
    model = settings.model.model_copy(update={"dim": dim})
    smaller = replace(task, dim=dim, config=settings.model_copy(update={"model": model}))
    return host.needed(smaller, type(method)(smaller))
