"""What training a client costs, relative to others, and in multiply-adds."""

from __future__ import annotations

from pfedmoe_mpi.algorithms.base import Algorithm, Task
from pfedmoe_mpi.models.cost import multiply_adds


def client_costs(task: Task) -> list[float]:
    """Relative cost of training each client for one epoch: its samples times its own and the shared model."""
    by_name = {name: _cost(task, name) for name in {*task.pool, task.shared}}
    shared = by_name[task.shared]
    return [task.samples(k) * (by_name[task.architecture(k)] + shared) for k in range(task.clients)]


def _cost(task: Task, name: str) -> float:
    return multiply_adds(task.extractor(name).build(), task.shape, bool(task.vocabulary))


def sample_costs(task: Task, method: Algorithm) -> list[float]:
    """Multiply-adds of one training sample forward, per client: every model and extractor that it runs.

    Heads and gates beside them are not counted: below a hundredth of a convolutional extractor.
    """
    by_kind: dict[str, float] = {}
    for name in {*task.pool, task.shared}:
        cost = _cost(task, name)
        by_kind |= {part.kind: cost for part in (task.model(name), task.extractor(name))}
    shared = sum(by_kind.get(part.kind, 0.0) for part in method.state().values())
    own = {k: method.client_state(k) for k in range(min(task.clients, len(task.pool)))}
    sums = [shared + sum(by_kind.get(part.kind, 0.0) for part in spec.values()) for spec in own.values()]
    return [sums[k % len(sums)] for k in range(task.clients)]
