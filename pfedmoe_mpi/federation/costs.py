"""The cost of training a client, relative to others, and in multiply-adds."""

from __future__ import annotations

from pfedmoe_mpi.algorithms.base import Algorithm, Task
from pfedmoe_mpi.models.cost import multiply_adds


def client_costs(task: Task) -> list[float]:
    """Return the relative cost of training each client: for one epoch, or for `train.steps`.

    It is the number of its samples, each as often as it is trained, times the multiply-adds of its own and of
    the shared extractor.
    """
    train = task.config.train
    by_name = {name: _cost(task, name) for name in {*task.pool, task.shared}}
    shared = by_name[task.shared]
    rows = task.counts.sum(axis=1).tolist()
    trained = [n * train.passes(n) if train.steps else n for n in rows]
    return [n * (by_name[task.architecture(k)] + shared) for k, n in enumerate(trained)]


def _cost(task: Task, name: str) -> float:
    """Return the multiply-adds of one sample through an architecture's extractor."""
    return multiply_adds(task.extractor(name).build(), task.shape, bool(task.vocabulary))


def sample_costs(task: Task, method: Algorithm) -> list[float]:
    """Return, by client, the multiply-adds of one training sample forward through all models that it runs.

    Extra heads and gates are not counted: they are below a hundredth of a convolutional extractor.
    """
    by_kind: dict[str, float] = {}
    for name in {*task.pool, task.shared}:
        cost = _cost(task, name)
        by_kind |= {part.kind: cost for part in (task.model(name), task.extractor(name))}
    shared = sum(by_kind.get(part.kind, 0.0) for part in method.state().values())
    specs = [method.client_state(k) for k in range(min(task.clients, len(task.pool)))]
    sums = [shared + sum(by_kind.get(part.kind, 0.0) for part in spec.values()) for spec in specs]
    return [sums[k % len(sums)] for k in range(task.clients)]
