"""For methods that send one vector per class: class means, and a server that trains on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pfedmoe_mpi.algorithms.base import Mean, Phase
from pfedmoe_mpi.core.fixedpoint import NotFiniteError
from pfedmoe_mpi.core.flat import Bound
from pfedmoe_mpi.core.parts import Module, Parts
from pfedmoe_mpi.core.sgd import SGD
from pfedmoe_mpi.core.turn import Turn


def class_means(turn: Turn, classes: int, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of `of(x)` (B, size) over the client's training samples of every class, in evaluation mode.

    Returns:
        float32 (classes, size) on the turn's device; NaN for a class without samples.
    """
    sums: Tensor | None = None
    counts = torch.zeros(classes, device=turn.device)
    for batch in turn.training_batches():
        found = of(batch.x).float()
        sums = found.new_zeros((classes, found.shape[1])) if sums is None else sums
        sums.index_add_(0, batch.y, found)
        counts += torch.bincount(batch.y, minlength=classes)
    assert sums is not None, "a client without training samples"
    return sums / counts[:, None]


def received(mean: Mean) -> tuple[Tensor, Tensor]:
    """The rows that members sent in a slot of one row per class: (n, size) and their classes int64 (n,).

    Member by member in the cohort's order, ascending by class: an order that no number of ranks changes.
    """
    sent = mean.weight > 0
    return mean.value[sent], sent.nonzero()[:, 1]


def train_on_server(
    part: Module,
    vector: Tensor,
    phase: Phase,
    rate: float,
    rows: tuple[Tensor, Tensor],
    batch: int,
    generator: torch.Generator,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> nn.Module:
    """SGD of a part over labelled rows, shuffled every epoch, a smaller last batch kept; `vector` in place.

    Args:
        phase: epochs, momentum, weight decay, clip, and the learning rate under the name "server".
        rate: factor on the learning rate.
        rows: (n, size) and labels int64 (n,).
        loss: scalar of the module, a batch of rows and their labels.

    Returns:
        The trained module, in evaluation mode.

    Raises:
        NotFiniteError: what was trained is not finite.
    """
    bound = Bound(part.build(), torch.device("cpu"))
    bound.load(vector)
    optimiser = SGD(Parts({"server": bound}), phase, rate)
    module = bound.module.train()
    for _ in range(phase.epochs):
        for chosen in torch.randperm(len(rows[1]), generator=generator).split(batch):
            optimiser.zero_grad()
            loss(module, rows[0][chosen], rows[1][chosen]).backward()
            optimiser.step()
    optimiser.zero_grad()
    if not bool(bound.vector.isfinite().all()):
        raise NotFiniteError("what the server trained is not finite")
    vector.copy_(bound.vector)
    return module.eval()
