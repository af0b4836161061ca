"""The memory that a federation's models take, estimated before any of it is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pfedmoe_mpi.algorithms.base import Algorithm, Task
from pfedmoe_mpi.core.parts import Workbench
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.mpi.memory import shortage


@dataclass(frozen=True)
class Host:
    """What rank 0's host has to hold: the share of `local` of `ranks` ranks, with models there or on GPUs."""

    local: int = 1
    ranks: int = 1
    cpu: bool = True

    def needed(self, task: Task, method: Algorithm, clients: int) -> float:
        """Return bytes: the clients' vectors, and weights, gradients, momenta and a copy of a rank's models.

        Layouts are made on the meta device. Activations and samples are not counted.
        """
        bench = Workbench(task.config.seed, torch.device("cpu"))
        models = min(clients, len(task.pool))
        sizes = [bench.layout(method.client_state(client)).size for client in range(models)]
        vectors = sum(size * len(range(number, clients, len(task.pool))) for number, size in enumerate(sizes))
        bound = sum(set(sizes)) + bench.layout(method.state()).size
        return 4.0 * self.local * (vectors / self.ranks + (4 if self.cpu else 1) * bound)


def check(task: Task, method: Algorithm, host: Host) -> None:
    """Refuse models that do not fit into the memory of rank 0's host.

    Raises:
        ConfigError: they do not; the message has the setting that makes them fit.
    """
    problem = shortage(host.needed(task, method, task.clients), host.local)
    if problem:
        raise ConfigError(
            f"the models do not fit (model.dim = {task.dim}): {problem}", _remedy(task, method, host)
        )


def _remedy(task: Task, method: Algorithm, host: Host) -> str:
    """Return fewer clients where one per rank fits, else a shorter representation."""
    clients, few = task.clients // 2, min(task.clients, host.ranks)
    if few < task.clients and not shortage(host.needed(task, method, few), host.local):
        while shortage(host.needed(task, method, clients), host.local):
            clients //= 2
        return f"--clients {clients} fits; or use more hosts, a smaller --model.pool or --model.dim"
    dim = task.dim // 2
    while dim and shortage(_shorter(task, method, dim, host), host.local):
        dim //= 2
    return f"--model.dim {dim} fits" if dim else "use a smaller --model.pool, or a host with more memory"


def _shorter(task: Task, method: Algorithm, dim: int, host: Host) -> float:
    """Return the bytes that are needed with a representation of `dim` numbers."""
    settings = task.config
    model = settings.model.model_copy(update={"dim": dim})
    smaller = replace(task, dim=dim, config=settings.model_copy(update={"model": model}))
    return host.needed(smaller, type(method)(smaller), task.clients)
