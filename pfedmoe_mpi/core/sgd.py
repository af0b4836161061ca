"""The optimisers of a client step, its phases, and the learning-rate schedule.

The optimisers of torch.optim are not used: they import torch's compiler when constructed, which takes every
rank as long as importing torch. Their fused kernels are called instead.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from pfedmoe_mpi.core.parts import Parts

if TYPE_CHECKING:
    from pfedmoe_mpi.config.sections import Train

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Phase:
    """Training of some parts, with a learning rate by part name. Other parts are frozen, in evaluation mode.

    The parts in `plain` are trained by SGD without momentum and weight decay, whatever the optimiser. If
    `steps` is positive, the phase ends after as many updates, whatever `epochs` is. An update has the mean
    gradient of `accumulate` batches. `betas` and `eps` are those of adam and adamw.
    """

    lr: Mapping[str, float]
    epochs: int
    momentum: float
    weight_decay: float
    clip: float
    plain: frozenset[str] = frozenset()
    optimiser: str = "sgd"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    steps: int = 0
    accumulate: int = 1

    @classmethod
    def configured(
        cls,
        train: Train,
        lr: Mapping[str, float],
        epochs: int | None = None,
        momentum: float | None = None,
        plain: Collection[str] = (),
    ) -> Phase:
        """Return a phase of the settings `train`; the arguments are those of `Algorithm.phase`."""
        return cls(
            lr,
            epochs=train.epochs if epochs is None else epochs,
            momentum=train.momentum if momentum is None else momentum,
            weight_decay=train.weight_decay,
            clip=train.clip,
            plain=frozenset(plain),
            optimiser=train.optimiser,
            betas=(train.betas[0] if momentum is None else momentum, train.betas[1]),
            eps=train.eps,
            steps=train.steps if epochs is None else 0,
            accumulate=train.accumulate,
        )


def learning_rate_factor(train: Train, round: int, rounds: int) -> float:
    """Return the factor on learning rates in a round, 1 before round 1.

    In round r of a warm-up of W rounds it is r / (W + 1). In the T − W rounds after that, `train.schedule`
    begins at 1, and n rounds later cosine is (1 + cos(π n / (T − W))) / 2, linear 1 − n / (T − W), step
    γ^⌊n / step_size⌋, and exponential γ^n.
    """
    if 1 <= round <= train.warmup:
        return round / (train.warmup + 1)
    done = max(0, round - 1 - train.warmup)
    if train.schedule == "step":
        return float(train.gamma ** (done // train.step_size))
    if train.schedule == "exponential":
        return float(train.gamma**done)
    share = done / max(1, rounds - train.warmup)
    if train.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    return 1 - share if train.schedule == "linear" else 1.0


class Optimiser:
    """The optimiser of a phase: a fused update of each part with its learning rate; its state starts at zero.

    The update order is torch's. Parameters without a gradient are not changed.

    Args:
        groups: parts whose gradients have one norm to clip; default: all in one group.
    """

    def __init__(
        self,
        parts: Parts,
        phase: Phase,
        factor: float,
        device: torch.device = CPU,
        groups: Sequence[Sequence[str]] = (),
    ) -> None:
        self._clip = phase.clip
        self._updates: list[_SGD | _Adam] = []
        for name, lr in phase.lr.items():
            parameters = parts.parameters(name)
            if name in phase.plain:
                self._updates.append(_SGD(parameters, lr * factor, 0.0, 0.0))
            elif phase.optimiser == "sgd":
                self._updates.append(_SGD(parameters, lr * factor, phase.momentum, phase.weight_decay))
            else:
                self._updates.append(_Adam(parameters, lr * factor, phase))
        groups = groups or [list(phase.lr)]
        self._groups = [[p for name in names for p in parts.parameters(name)] for names in groups]
        # Sum of the gradient norms: finite if all are.
        self.norms = torch.zeros((), dtype=torch.float64, device=device)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for group in self._groups:
            for parameter in group:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Clip the joint norm of each group's gradients, and do one update."""
        for group in self._groups if self._clip else ():
            self.norms += nn.utils.clip_grad_norm_(group, self._clip)
        for update in self._updates:
            update.step()

    def state_tensors(self) -> list[torch.Tensor]:
        """Return all that updates change besides the parameters: momenta, moments, counts and the norms."""
        return [self.norms, *(tensor for update in self._updates for tensor in update.state_tensors())]

    def reset(self) -> None:
        """Set the state to zero in place."""
        for tensor in self.state_tensors():
            tensor.zero_()


class _SGD:
    """SGD with momentum m and L2 weight decay λ: v ← m·v + g + λ·w, w ← w − η·v."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        self._lr, self._momentum, self._weight_decay = lr, momentum, weight_decay
        self._state = [(p, torch.zeros_like(p)) for p in parameters]
        self._first = True

    def step(self) -> None:
        """Do one update."""
        updates = [(p, p.grad, v) for p, v in self._state if p.grad is not None]
        if updates:
            parameters, gradients, velocities = (list(column) for column in zip(*updates, strict=True))
            torch._fused_sgd_(
                parameters,
                gradients,
                velocities if self._momentum else [],
                weight_decay=self._weight_decay,
                momentum=self._momentum,
                lr=self._lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=self._first,
            )
        self._first = False

    def state_tensors(self) -> list[torch.Tensor]:
        """Return the velocities."""
        return [velocity for _, velocity in self._state]


class _Adam:
    """Adam (Kingma, Ba: ICLR 2015) with L2 weight decay, or AdamW (Loshchilov, Hutter: ICLR 2019).

    m ← β1·m + (1 − β1)·g, v ← β2·v + (1 − β2)·g², w ← w − η·m̂ / (√v̂ + ε) in update t, with m̂ = m / (1 − β1^t)
    and v̂ = v / (1 − β2^t). adam adds λ·w to g; adamw first sets w ← (1 − η·λ)·w.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, phase: Phase) -> None:
        self._lr, self._phase = lr, phase
        self._state = [
            (p, torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=p.device))
            for p in parameters
        ]

    def step(self) -> None:
        """Do one update."""
        updates = [(p, p.grad, *state) for p, *state in self._state if p.grad is not None]
        if not updates:
            return
        parameters, gradients, means, squares, counts = (list(c) for c in zip(*updates, strict=True))
        torch._foreach_add_(counts, 1.0)
        kernel = torch._fused_adamw_ if self._phase.optimiser == "adamw" else torch._fused_adam_
        kernel(
            parameters,
            gradients,
            means,
            squares,
            [],
            counts,
            lr=self._lr,
            beta1=self._phase.betas[0],
            beta2=self._phase.betas[1],
            weight_decay=self._phase.weight_decay,
            eps=self._phase.eps,
            amsgrad=False,
            maximize=False,
        )

    def state_tensors(self) -> list[torch.Tensor]:
        """Return the means, the squares and the counts."""
        return [tensor for _, *state in self._state for tensor in state]
