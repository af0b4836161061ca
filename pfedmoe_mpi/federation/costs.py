"""The cost of training a client, relative to others."""

from __future__ import annotations

from pfedmoe_mpi.algorithms.base import Task
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
