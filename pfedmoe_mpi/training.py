"""A client's turn: SGD over its parts, and the measuring of its model.

What decides bits and results: momentum starts at zero in every client step and is never kept; data are
shuffled every epoch; the last smaller batch is trained; `clip` is the joint norm of what the step trains;
weight decay and momentum never touch buffers; evaluation uses running statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from pfedmoe_mpi import seeds
from pfedmoe_mpi.auc import auc
from pfedmoe_mpi.client import Client
from pfedmoe_mpi.data import shard
from pfedmoe_mpi.data.shard import Batch, Normalise, Split
from pfedmoe_mpi.fixedpoint import SCALE, NotFiniteError
from pfedmoe_mpi.parts import Parts

if TYPE_CHECKING:
    from pfedmoe_mpi.algorithms.base import Algorithm, Phase
    from pfedmoe_mpi.sections import Train


def learning_rate_factor(schedule: str, round: int, rounds: int) -> float:
    """Factor on every learning rate in round 1..rounds: 1 before and in round 1, towards 0 after the last."""
    done = max(0, round - 1) / rounds
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
        self._groups = [
            (parts.parameters(name), lr * factor, name not in phase.plain) for name, lr in phase.lr.items()
        ]
        self._momenta = [[torch.zeros_like(p) for p in group] for group, _, _ in self._groups]
        self._all = [p for group, _, _ in self._groups for p in group]
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
        for (group, lr, full), momenta in zip(self._groups, self._momenta, strict=True):
            momentum = self._phase.momentum if full else 0.0
            held = [(p, p.grad, v) for p, v in zip(group, momenta, strict=True) if p.grad is not None]
            if held:
                parameters, gradients, velocities = (list(column) for column in zip(*held, strict=True))
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
        # Bytes a deployment would send this client, and it would send back, where that is not the whole state
        # and the payload as it is: a method that compresses, or sends some of its experts, says it here.
        self.bytes_down: int | None = None
        self.bytes_up: int | None = None
        self._engine = engine
        self._method = method
        self._splits = client.splits
        self._split = client.splits["train"]
        self._generator = seeds.torch_generator(engine.seed, "batches", round, client.id)
        seeds.seed_global(engine.seed, "step", round, client.id)

    def sgd(
        self,
        phase: Phase,
        loss: Callable[[Batch], torch.Tensor] | None = None,
        enough: Callable[[int], bool] | None = None,
    ) -> int:
        """Train the phase's parts in place; the number of steps taken.

        Args:
            loss: scalar of a batch; default: the method's.
            enough: asked after every step, with their number so far; True ends the training.

        Raises:
            NotFiniteError: a loss or the norm of a gradient was not finite. Clipping scales a gradient of
                infinite norm to zero, so that the vectors alone would not show it.
        """
        modules = self.parts.modules()
        for name, module in modules.items():
            module.train(name in phase.lr)
            module.requires_grad_(name in phase.lr)
        optimiser = SGD(self.parts, phase, self.rate)
        steps, ended = 0, False
        for _ in range(phase.epochs):
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            seen = 0
            for batch in self._epoch():
                self._engine.poll()
                optimiser.zero_grad()
                with self._engine.autocast():
                    value = loss(batch) if loss else self._method.loss(self.parts, batch)
                value.backward()
                optimiser.step()
                total += value.detach().double() * len(batch)
                seen += len(batch)
                steps += 1
                ended = enough is not None and enough(steps)
                if ended:
                    break
            self.loss = float(total) / seen
            if not math.isfinite(self.loss + float(optimiser.norms)):
                raise NotFiniteError("its loss or its gradient is not finite")
            if ended:
                break
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

    @property
    def labels(self) -> torch.Tensor:
        """Classes of the training samples that count in this round, int64 (n_k,), on the device."""
        return self._split.y

    def batches(self, split: str) -> Iterator[Batch]:
        """A split's samples once, in order, in evaluation mode, without gradients or augmentation."""
        for module in self.parts.modules().values():
            module.eval()
        with torch.no_grad(), self._engine.autocast():
            for batch in shard.batches(
                self._splits[split], self._engine.evaluation_batch, self._engine.normalise
            ):
                self._engine.poll()
                yield batch

    def training_batches(self) -> Iterator[Batch]:
        """`batches` of the training samples."""
        return self.batches("train")


@dataclass(frozen=True)
class Measured:
    """One client measured on one split; `alpha` is the mean gate weight of the shared experts together.

    `auc` is NaN unless the task has two classes and the split samples of both.
    `gate` int64 (2, classes), on the CPU: by class the samples, and Σ α·2^SCALE of them; None without gate.
    """

    correct: int
    samples: int
    loss: float
    alpha: float
    auc: float
    gate: torch.Tensor | None


def inputs(engine: Engine, split: Split) -> Iterator[torch.Tensor]:
    """A split's samples (B, *shape), normalised, without labels."""
    for batch in shard.batches(split, engine.evaluation_batch, engine.normalise):
        engine.poll()
        yield batch.x


def measure(
    engine: Engine, method: Algorithm, parts: Parts, split: Split, unseen: bool = False
) -> Measured | None:
    """Accuracy, mean cross-entropy, mean gate weight and AUC of a client's answers on a split.

    None where the method has no answer for a client that never trained.
    """
    correct = torch.zeros((), dtype=torch.int64, device=engine.device)
    loss = torch.zeros((), dtype=torch.float64, device=engine.device)
    alpha = torch.zeros((), dtype=torch.float64, device=engine.device)
    scores: list[torch.Tensor] = []  # of class 1 against class 0
    gate: torch.Tensor | None = None
    for module in parts.modules().values():
        module.eval()
    with torch.no_grad(), engine.autocast():
        answer = method.answer(parts, partial(inputs, engine, split), unseen)
        if answer is None:
            return None
        for batch in shard.batches(split, engine.evaluation_batch, engine.normalise):
            engine.poll()
            logits = answer(batch.x).float()
            correct += (logits.argmax(1) == batch.y).sum()
            loss += nn.functional.cross_entropy(logits, batch.y, reduction="sum").double()
            weights = method.weights(parts, batch.x)
            alpha += float("nan") if weights is None else weights[:, :-1].double().sum()
            if weights is not None:
                found = _by_class(weights[:, :-1].double().sum(1), batch.y, logits.shape[1])
                gate = found if gate is None else gate + found
            if logits.shape[1] == 2:
                scores.append(logits[:, 1] - logits[:, 0])
    n = len(split)
    ranked = auc(torch.cat(scores).cpu().numpy(), split.y.cpu().numpy()) if scores else math.nan
    mean_loss, mean_alpha = (float(total) / n if n else math.nan for total in (loss, alpha))
    return Measured(int(correct), n, mean_loss, mean_alpha, ranked, None if gate is None else gate.cpu())


def _by_class(alpha: torch.Tensor, y: torch.Tensor, classes: int) -> torch.Tensor:
    """Integers, so that no order of clients and batches matters; α that are not finite are left out."""
    finite = alpha.isfinite()
    numbers = torch.stack([finite.double(), torch.where(finite, alpha, 0.0) * 2.0**SCALE])
    return torch.zeros((2, classes), dtype=torch.int64, device=y.device).index_add_(
        1, y, numbers.round().long()
    )
