"""A client's turn: SGD over its parts, and the measuring of its model.

What decides bits and results: momentum starts at zero in every client step and is never kept; data are
shuffled every epoch; the last smaller batch is trained; `clip` is the joint norm of what the step trains;
weight decay and momentum never touch buffers; evaluation uses running statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from pfedmoe_mpi import seeds
from pfedmoe_mpi.client import Client
from pfedmoe_mpi.data import shard
from pfedmoe_mpi.data.shard import Batch, Normalise, Split
from pfedmoe_mpi.fixedpoint import NotFiniteError
from pfedmoe_mpi.parts import Parts

if TYPE_CHECKING:
    from pfedmoe_mpi.algorithms.base import Algorithm, Phase
    from pfedmoe_mpi.config import Train


def learning_rate_factor(schedule: str, round: int, rounds: int) -> float:
    """Factor on every learning rate in round 1..rounds: 1 in round 1, towards 0 after the last."""
    done = (round - 1) / rounds
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if schedule == "linear" else 1.0


class SGD:
    """SGD with momentum and weight decay, in torch's update order, over parts with unlike learning rates.

    v ← m·v + g + λ·w, w ← w − η·v, in one fused pass over each part's parameters. torch.optim's own
    optimisers import torch's compiler when constructed, which takes every rank as long as importing torch.
    """

    def __init__(self, parts: Parts, phase: Phase, factor: float) -> None:
        self._phase = phase
        self._groups = [(parts.parameters(name), lr * factor) for name, lr in phase.lr.items()]
        self._momenta = [[torch.zeros_like(p) for p in group] for group, _ in self._groups]
        self._all = [p for group, _ in self._groups for p in group]
        self._first = True
        self.norms = torch.zeros((), dtype=torch.float64)  # added up: finite if all are

    def zero_grad(self) -> None:
        for parameter in self._all:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One update; parameters without a gradient stay."""
        if self._phase.clip:
            norm = nn.utils.clip_grad_norm_(self._all, self._phase.clip)
            self.norms = self.norms.to(norm.device) + norm
        for (group, lr), momenta in zip(self._groups, self._momenta, strict=True):
            held = [(p, p.grad, v) for p, v in zip(group, momenta, strict=True) if p.grad is not None]
            if held:
                parameters, gradients, velocities = (list(column) for column in zip(*held, strict=True))
                torch._fused_sgd_(
                    parameters,
                    gradients,
                    velocities if self._phase.momentum else [],
                    weight_decay=self._phase.weight_decay,
                    momentum=self._phase.momentum,
                    lr=lr,
                    dampening=0.0,
                    nesterov=False,
                    maximize=False,
                    is_first_step=self._first,
                )
        self._first = False


@dataclass(frozen=True)
class Engine:
    """How this rank computes: the same for every client."""

    device: torch.device
    normalise: Normalise
    train: Train
    evaluation_batch: int
    seed: int
    rounds: int
    poll: Callable[[], None]  # raises StoppedError

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.train.precision == "bf16")


class Turn:
    """One client's step in one round: what a method may use of it."""

    def __init__(
        self, engine: Engine, method: Algorithm, client: Client, parts: Parts, round: int, role: str
    ) -> None:
        self.client = client.id
        self.round = round
        self.role = role
        self.parts = parts
        self.device = engine.device
        self.rate = learning_rate_factor(engine.train.schedule, round, engine.rounds)
        self.loss = float("nan")  # mean training loss per sample of the last epoch trained
        self._engine = engine
        self._method = method
        self._split = client.splits["train"]
        self._generator = seeds.torch_generator(engine.seed, "batches", round, client.id)
        seeds.seed_global(engine.seed, "step", round, client.id)

    def sgd(self, phase: Phase) -> int:
        """Train the phase's parts in place; the number of steps taken.

        Raises:
            NotFiniteError: a loss or the norm of a gradient was not finite. Clipping scales a gradient of
                infinite norm to zero, so that the vectors alone would not show it.
        """
        modules = self.parts.modules()
        for name, module in modules.items():
            module.train(name in phase.lr)
            module.requires_grad_(name in phase.lr)
        optimiser = SGD(self.parts, phase, self.rate)
        steps = 0
        for _ in range(phase.epochs):
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for batch in self._epoch():
                self._engine.poll()
                optimiser.zero_grad()
                with self._engine.autocast():
                    loss = self._method.loss(self.parts, batch)
                loss.backward()
                optimiser.step()
                total += loss.detach().double() * len(batch)
                steps += 1
            self.loss = float(total) / len(self._split)
            if not math.isfinite(self.loss + float(optimiser.norms)):
                raise NotFiniteError("its loss or its gradient is not finite")
        optimiser.zero_grad()
        return steps

    def _epoch(self) -> Iterator[Batch]:
        engine = self._engine
        return shard.epoch(
            self._split, engine.train.batch, engine.normalise, engine.train.augment, self._generator
        )

    @property
    def samples(self) -> int:
        """n_k."""
        return len(self._split)

    def training_batches(self) -> Iterator[Batch]:
        """The training samples once, in order, in evaluation mode, without gradients or augmentation."""
        for module in self.parts.modules().values():
            module.eval()
        with torch.no_grad(), self._engine.autocast():
            for batch in shard.batches(self._split, self._engine.evaluation_batch, self._engine.normalise):
                self._engine.poll()
                yield batch


@dataclass(frozen=True)
class Measured:
    """One client measured on one split; `alpha` is the mean gate weight of the shared expert."""

    correct: int
    samples: int
    loss: float
    alpha: float


def measure(engine: Engine, method: Algorithm, parts: Parts, split: Split) -> Measured:
    """Accuracy, mean cross-entropy and mean gate weight of the client's whole model on a split."""
    correct = torch.zeros((), dtype=torch.int64, device=engine.device)
    loss = torch.zeros((), dtype=torch.float64, device=engine.device)
    alpha = torch.zeros((), dtype=torch.float64, device=engine.device)
    for module in parts.modules().values():
        module.eval()
    with torch.no_grad(), engine.autocast():
        for batch in shard.batches(split, engine.evaluation_batch, engine.normalise):
            engine.poll()
            logits = method.predict(parts, batch.x).float()
            correct += (logits.argmax(1) == batch.y).sum()
            loss += nn.functional.cross_entropy(logits, batch.y, reduction="sum").double()
            weights = method.weights(parts, batch.x)
            alpha += float("nan") if weights is None else weights[:, 0].double().sum()
    n = len(split)
    return Measured(int(correct), n, float(loss) / n if n else math.nan, float(alpha) / n if n else math.nan)
