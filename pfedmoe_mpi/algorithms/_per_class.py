"""Functions for methods that send one vector per class: class means, and training on the server."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pfedmoe_mpi.algorithms.base import Mean, Phase
from pfedmoe_mpi.core.fixedpoint import NotFiniteError
from pfedmoe_mpi.core.flat import Bound
from pfedmoe_mpi.core.parts import Module, Parts
from pfedmoe_mpi.core.sgd import Optimiser
from pfedmoe_mpi.core.turn import Turn


def class_means(turn: Turn, classes: int, extract: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mean of `extract(x)` over the client's training samples of each class, in evaluation mode.

    Args:
        extract: samples (B, *shape) to vectors (B, size).

    Returns:
        float32 (classes, size) on the turn's device; NaN for a class without samples.
    """
    sums: Tensor | None = None
    counts = torch.zeros(classes, device=turn.device)
    for batch in turn.training_batches():
        vectors = extract(batch.x).float()
        sums = vectors.new_zeros((classes, vectors.shape[1])) if sums is None else sums
        sums.index_add_(0, batch.y, vectors)
        counts += class_counts(batch.y, classes)
    assert sums is not None, "the client has no training samples"
    return sums / counts[:, None]


def nearest_prototype(prototypes: Tensor, extract: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return logits (B, classes): minus the mean squared difference of `extract(x)` to each prototype.

    A class whose prototype (a row of (classes, d)) is NaN has −∞, so that it is never the answer.
    """
    r = extract(x)
    distances = torch.stack([(r - prototype).square().mean(1) for prototype in prototypes], 1)
    return torch.where(prototypes.isnan().any(1), -torch.inf, -distances)


def class_counts(y: Tensor, classes: int) -> Tensor:
    """Return the number of samples of each class, int64 (classes,), without waiting for the device.

    `torch.bincount` waits for it.
    """
    return torch.zeros(classes, dtype=torch.int64, device=y.device).index_add_(0, y, torch.ones_like(y))


def collect_rows(mean: Mean) -> tuple[Tensor, Tensor]:
    """Return the rows that members sent in a slot with one row per class: (n, size), and classes int64 (n,).

    The order is that of the cohort, then ascending by class, so it does not depend on the number of ranks.
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
    """Train a part by SGD on labelled rows, shuffled every epoch, and write the result into `vector`.

    A smaller last batch is trained too.

    Args:
        phase: epochs, momentum, weight decay, clip, and the learning rate under the name "server".
        rate: factor on the learning rate.
        rows: vectors (n, size) and labels int64 (n,).
        loss: takes the module, a batch of rows and their labels; returns a scalar.

    Returns:
        The trained module, in evaluation mode.

    Raises:
        NotFiniteError: a trained value is not finite.
    """
    bound = Bound(part.build(), torch.device("cpu"))
    bound.load(vector)
    optimiser = Optimiser(Parts({"server": bound}), phase, rate)
    module = bound.module.train()
    vectors, labels = rows
    for _ in range(phase.epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(batch):
            optimiser.zero_grad()
            loss(module, vectors[chosen], labels[chosen]).backward()
            optimiser.step()
    optimiser.zero_grad()
    if not bool(bound.vector.isfinite().all()):
        raise NotFiniteError("the vector that the server trained is not finite")
    vector.copy_(bound.vector)
    return module.eval()
