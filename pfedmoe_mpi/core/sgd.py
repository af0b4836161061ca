"""SGD in torch's update order, the phases of a client step, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from pfedmoe_mpi.core.parts import Parts


@dataclass(frozen=True)
class Phase:
    """SGD over some parts, with a learning rate by part name. Other parts are frozen, in evaluation mode.

    The parts in `plain` are trained without momentum and weight decay.
    """

    lr: Mapping[str, float]
    epochs: int
    momentum: float
    weight_decay: float
    clip: float
    plain: frozenset[str] = frozenset()


def learning_rate_factor(schedule: str, round: int, rounds: int) -> float:
    """Return the factor on learning rates in a round: 1 up to round 1, then falling to 0 after the last."""
    done = max(0, round - 1) / rounds
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if schedule == "linear" else 1.0


class SGD:
    """SGD with momentum and weight decay, in torch's update order, over parts with different learning rates.

    v ← m·v + g + λ·w, w ← w − η·v, in one fused pass over each part's parameters. The optimisers of
    torch.optim are not used: they import torch's compiler when constructed, which takes every rank as long as
    importing torch.
    """

    def __init__(self, parts: Parts, phase: Phase, factor: float) -> None:
        self._phase = phase
        self._groups = [
            (parts.parameters(name), lr * factor, name not in phase.plain) for name, lr in phase.lr.items()
        ]
        self._momenta = [[torch.zeros_like(p) for p in group] for group, _, _ in self._groups]
        self._all = [p for group, _, _ in self._groups for p in group]
        self._first = True
        self.norms = torch.zeros((), dtype=torch.float64)  # sum of the gradient norms: finite if all are

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self._all:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Do one update; parameters without a gradient are not changed."""
        if self._phase.clip:
            norm = nn.utils.clip_grad_norm_(self._all, self._phase.clip)
            self.norms = self.norms.to(norm.device) + norm
        for (group, lr, full), momenta in zip(self._groups, self._momenta, strict=True):
            momentum = self._phase.momentum if full else 0.0
            updates = [(p, p.grad, v) for p, v in zip(group, momenta, strict=True) if p.grad is not None]
            if updates:
                parameters, gradients, velocities = (list(column) for column in zip(*updates, strict=True))
                torch._fused_sgd_(
                    parameters,
                    gradients,
                    velocities if momentum else [],
                    weight_decay=self._phase.weight_decay if full else 0.0,
                    momentum=momentum,
                    lr=lr,
                    dampening=0.0,
                    nesterov=False,
                    maximize=False,
                    is_first_step=self._first,
                )
        self._first = False
