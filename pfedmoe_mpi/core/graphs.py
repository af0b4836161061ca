"""Training steps as CUDA graphs: a step is captured once, and replayed for every client of its architecture.

A bound module has fixed addresses, and so has every tensor of a part: all that a step reads besides is its
batch, which is copied to where the capture read it. A graph holds what a step computes with as constants; so
one belongs to one combination of parts, phase and learning rate, and to one size of batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.sgd import Phase
from pfedmoe_mpi.core.step import Step
from pfedmoe_mpi.log import LOGGER

WARM_UP = 3  # steps before a capture, in which libraries choose kernels and allocate memory
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def capture(work: Callable[[], None]) -> Callable[[], None]:
    """Run `work` a few times and return its replay as a CUDA graph.

    Raises:
        RuntimeError: it cannot be captured, for example because it waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


class Graphs:
    """The captured steps of this rank.

    Args:
        batch: size of the batches of captured steps; a step with another one is not captured.
    """

    def __init__(self, batch: int, capture: Capture = capture) -> None:
        self._batch, self._capture = batch, capture
        self._rate: float | None = None
        self._steps: dict[Hashable, GraphStep] = {}

    @property
    def captured(self) -> int:
        """The number of steps that are replayed."""
        return sum(step.captured for step in self._steps.values())

    def step(
        self, parts: Parts, phase: Phase, rate: float, make: Callable[[type[GraphStep]], GraphStep]
    ) -> Step:
        """Return the step of these parts and this phase, ready for a new client.

        Args:
            rate: factor on the learning rates; steps of another one are forgotten.
            make: constructs a step.
        """
        if rate != self._rate:
            self._steps.clear()
            self._rate = rate
        key = (repr(phase), parts.addresses())
        if key not in self._steps:
            self._steps[key] = make(GraphStep)
            self._steps[key].prepare(parts, (self._batch,) * phase.accumulate, self._capture)
        step = self._steps[key]
        step.begin()
        return step


class GraphStep(Step):
    """A step that captures itself when it first sees batches of the full size, and is replayed from then on.

    If it cannot be captured, it is computed like any other, and a note says so.
    """

    def prepare(self, parts: Parts, sizes: tuple[int, ...], capture: Capture) -> None:
        """Set what is captured: a step over `parts` with batches of these sizes."""
        self._names = ", ".join(parts.modules())
        self._sizes, self._capture = sizes, capture
        self._changed = [*parts.state_tensors(), *self._optimiser.state_tensors(), self._total]
        self._inputs: list[Batch] = []
        self._replay: Callable[[], None] | None = None
        self._fails = False

    @property
    def captured(self) -> bool:
        """Whether the step has been captured."""
        return self._replay is not None

    def begin(self) -> None:
        """Set the optimiser's state and the sum of losses to zero, for a new client."""
        self._optimiser.reset()
        self._total.zero_()

    def __call__(self, group: Sequence[Batch]) -> None:
        if self._fails or tuple(map(len, group)) != self._sizes:
            super().__call__(group)
            return
        if self._replay is None:
            self._replay = self._captured(group)
        if self._replay is None:
            super().__call__(group)
            return
        self._poll()
        for own, batch in zip(self._inputs, group, strict=True):
            for mine, given in ((own.x, batch.x), (own.y, batch.y), (own.rows, batch.rows)):
                mine.copy_(given)
        self._replay()

    def _captured(self, group: Sequence[Batch]) -> Callable[[], None] | None:
        """Return the replay of a step with batches like these; None if it cannot be captured.

        What the steps before the capture changed is restored.
        """
        kept = [tensor.clone() for tensor in self._changed]
        on_gpu = self._total.is_cuda
        generator = torch.cuda.get_rng_state(self._total.device) if on_gpu else torch.get_rng_state()
        self._inputs = [Batch(batch.x.clone(), batch.y.clone(), batch.rows.clone()) for batch in group]
        try:
            return self._capture(lambda: self._update(self._inputs, lambda: None))
        except RuntimeError as error:
            self._fails = True
            reason = str(error).partition("\n")[0]
            LOGGER.warning("train.graphs = on: a step of %s is computed without: %s", self._names, reason)
            return None
        finally:
            with torch.no_grad():
                for tensor, before in zip(self._changed, kept, strict=True):
                    tensor.copy_(before)
            if on_gpu:
                torch.cuda.set_rng_state(generator, self._total.device)
            else:
                torch.set_rng_state(generator)
