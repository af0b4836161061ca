"""A client's turn: one client step of one round, training over its parts.

These rules decide results: momentum and Adam's moments start at zero in every client step and are never kept;
data are shuffled every epoch; the smaller last batch is trained; the gradients of accumulated batches are
weighted by their samples, and a group of them ends with the epoch; `clip` is the joint norm of all parameters
that the step trains; weight decay and momentum never apply to buffers; evaluation uses running statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, TypeVar

import torch

from pfedmoe_mpi.core import batches, seeds
from pfedmoe_mpi.core.batches import Batch, Normalise, Split
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.fixedpoint import NotFiniteError
from pfedmoe_mpi.core.graphs import Graphs
from pfedmoe_mpi.core.kept import Kept
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.sample_step import NotPerSampleError, SamplePrivacy, SampleStep
from pfedmoe_mpi.core.sgd import Phase, learning_rate_factor
from pfedmoe_mpi.core.step import Step

if TYPE_CHECKING:
    from pfedmoe_mpi.config.sections import Train

Kind = TypeVar("Kind", bound=Step)
Loss = Callable[[Parts, Batch], torch.Tensor]  # of a method: a client's parts and a batch to a scalar


@dataclass(frozen=True)
class Engine:
    """The settings by which this rank computes, the same for every client."""

    device: torch.device
    normalise: Normalise
    train: Train
    evaluation_batch: int
    seed: int
    rounds: int
    poll: Callable[[], None]  # raises StoppedError
    kept: Kept | None = None  # outputs of frozen layers
    graphs: Graphs | None = None  # None: every step is computed anew
    samples: SamplePrivacy | None = None  # None: gradients are neither clipped by sample nor noised

    def batches(self, split: Split) -> Iterator[Batch]:
        """Yield a split's samples once, in order, for evaluations.

        Raises:
            StoppedError: a stop was asked for.
        """
        found = batches.batches(split, self.evaluation_batch, self.normalise)
        for batch in self._watched(found, split):
            self.poll()
            yield batch

    def epoch(self, split: Split, generator: torch.Generator) -> Generator[Batch, None, None]:
        """Yield a split's samples once, shuffled and augmented."""
        augment = self.train.augment
        found = batches.epoch(split, self.train.batch, self.normalise, augment, generator)
        return found if augment and split.x.ndim == 4 else self._watched(found, split)

    def poisson(
        self, split: Split, phase: Phase, expected: float, generator: torch.Generator
    ) -> Generator[tuple[Batch, ...], None, None]:
        """Yield the batches of an epoch's updates, each of `expected` samples drawn independently."""
        train = self.train
        updates = phase.steps or math.ceil(len(split) / expected)
        return batches.poisson(
            split, updates, expected, train.batch, self.normalise, train.augment, generator
        )

    def _watched(self, found: Generator[Batch, None, None], split: Split) -> Generator[Batch, None, None]:
        return self.kept.watch(found, split) if self.kept else found

    def autocast(self) -> torch.autocast:
        """Return the context of train.precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.train.precision == "bf16")


class Turn:
    """One client's step in one round, as a method sees it."""

    def __init__(
        self, engine: Engine, loss: Loss, client: Client, parts: Parts, round: int, role: str
    ) -> None:
        self.client = client.id
        self.round = round
        self.role = role
        self.parts = parts
        self.device = engine.device
        self.rate = learning_rate_factor(engine.train, round, engine.rounds)
        self.measured_loss = float("nan")  # for the round's row, also where a method may not read `loss`
        # Bytes that a deployment would send to and from this client. A method sets them if it does not send
        # the whole state and payload, for example because it compresses or sends only some experts.
        self.bytes_down: int | None = None
        self.bytes_up: int | None = None
        self.trained: list[Phase] = []  # phases so far
        self._engine = engine
        self._loss = loss
        self._splits = client.splits
        self._split = client.splits["train"]
        self._generator = seeds.torch_generator(engine.seed, "batches", round, client.id)
        self._noise = seeds.torch_generator(engine.seed, "sample noise", round, client.id)
        seeds.seed_global(engine.seed, "step", round, client.id)

    def sgd(
        self,
        phase: Phase,
        loss: Callable[[Batch], torch.Tensor] | None = None,
        enough: Callable[[int], bool] | None = None,
    ) -> int:
        """Train the phase's parts in place; return the number of updates.

        Args:
            loss: maps a batch to a scalar, the mean over its samples; default: the method's loss.
            enough: called after every update with the number of updates so far; True ends the training.

        Raises:
            NotFiniteError: a loss or the norm of a gradient was not finite. Clipping scales a gradient of
                infinite norm to zero, so a check of the vectors alone would miss it.
        """
        self.parts.train(phase.lr.keys())
        self.trained.append(phase)
        step = self._step(phase, loss)
        steps, ended, before = 0, False, (0.0, 0)
        for _ in count() if phase.steps else range(phase.epochs):
            seen = 0
            with closing(self._epoch(phase)) as groups:
                for group in groups:
                    step(group)
                    seen += sum(map(len, group))
                    steps += 1
                    ended = (enough is not None and enough(steps)) or steps == phase.steps
                    if ended:
                        break
            total, norms = step.read()
            whole = not ended or seen == len(self._split)  # Poisson batches have any number of samples
            before = (total, seen) if whole else (before[0] + total, before[1] + seen)
            if before[1]:  # an epoch of Poisson batches may have none
                self.measured_loss = before[0] / before[1]
            if not math.isfinite((self.measured_loss if before[1] else 0.0) + norms):
                raise NotFiniteError("its loss or its gradient is not finite")
            if ended:
                break
        step.end()
        return steps

    def _step(self, phase: Phase, loss: Callable[[Batch], torch.Tensor] | None) -> Step:
        """Return the updates of a phase.

        They are a graph if the loss is the method's own, the same for every client, and if no outputs of
        frozen layers are kept, which a graph would compute again.
        """
        engine = self._engine

        def make(kind: Callable[..., Kind]) -> Kind:
            own = loss or partial(self._loss, self.parts)
            return kind(self.parts, phase, self.rate, own, engine.autocast, engine.poll, self.device)

        if engine.samples:
            return make(
                partial(
                    SampleStep,
                    privacy=engine.samples,
                    precision=engine.train.precision,
                    generator=self._noise,
                    expected=self._expected(phase) if engine.samples.poisson else None,
                )
            )
        if engine.graphs and not loss and not (engine.kept and engine.kept.tails):
            return engine.graphs.step(self.parts, phase, self.rate, make)
        return make(Step)

    def _expected(self, phase: Phase) -> int:
        """Return the samples that an update has with privacy.sampling = poisson, in expectation."""
        return min(len(self._split), self._engine.train.batch * phase.accumulate)

    def _epoch(self, phase: Phase) -> Generator[tuple[Batch, ...], None, None]:
        """Yield the batches of an epoch, those of an update at a time."""
        engine = self._engine
        if engine.samples and engine.samples.poisson:
            yield from engine.poisson(self._split, phase, self._expected(phase), self._generator)
            return
        with closing(engine.epoch(self._split, self._generator)) as epoch:
            while group := tuple(islice(epoch, phase.accumulate)):
                yield group

    @property
    def loss(self) -> float:
        """Mean training loss per sample in the last epoch; an incomplete one counts with the one before it.

        Raises:
            NotPerSampleError: privacy.unit = sample.
        """
        self._check_read("loss")
        return self.measured_loss

    @property
    def samples(self) -> int:
        """Number of training samples, n_k."""
        return len(self._split)

    @property
    def labels(self) -> torch.Tensor:
        """Classes of the training samples of this round, int64 (n_k,), on the device.

        Raises:
            NotPerSampleError: privacy.unit = sample.
        """
        self._check_read("labels")
        return self._split.y

    def batches(self, split: str) -> Iterator[Batch]:
        """Yield a split's samples once, in order, in evaluation mode, without gradients or augmentation.

        Raises:
            NotPerSampleError: privacy.unit = sample.
        """
        self._check_read("batches")
        for module in self.parts.modules().values():
            module.eval()
        with torch.no_grad(), self._engine.autocast():
            yield from self._engine.batches(self._splits[split])

    def training_batches(self) -> Iterator[Batch]:
        """Yield `batches` of the training samples."""
        return self.batches("train")

    def _check_read(self, name: str) -> None:
        """With privacy.unit = sample, refuse what reads samples: no noise would cover what comes of it."""
        if self._engine.samples:
            raise NotPerSampleError(f"its client step reads samples without noise (Turn.{name})")
