"""Outputs of frozen layers, kept by client: computed once, not in every epoch and evaluation.

An extractor of which only its tail is trained answers a client's batch from what its frozen layers returned
for these rows before; a method does not notice. They are computed in batches of a split's rows in order, so
their bits depend on the rows and the batch size alone: not on ranks, restarts or the memory that is left.
Rounding can differ in the last bits from that of shuffled batches, mainly of those below 16 samples.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from pfedmoe_mpi.core import batches
from pfedmoe_mpi.core.batches import Batch, Normalise, Split
from pfedmoe_mpi.core.tail import Tail, extractor_of, replaced

Forward = Callable[[Tensor], Tensor]
LIMIT = 1 << 30  # bytes that a rank keeps; what is beyond is kept for as long as its split is in use


@dataclass(frozen=True)
class _Source:
    """The rows of a split that a batch consists of; the batch is still these while its version is."""

    split: Split
    rows: Tensor
    version: int


class Kept:
    """The outputs of frozen layers on a rank, by split and kind of module.

    Args:
        tails: by kind, of the modules with a tail.
        batch: the batch size in which outputs are computed.
        poll: raises StoppedError.
    """

    def __init__(
        self,
        tails: Mapping[str, Tail],
        normalise: Normalise,
        batch: int,
        poll: Callable[[], None],
        limit: int = LIMIT,
    ) -> None:
        self.tails = tails
        self._normalise, self._batch, self._poll, self._limit = normalise, batch, poll, limit
        self._sources = WeakIdKeyDictionary()  # by tensor of samples
        self._outputs: WeakKeyDictionary[Split, dict[str, Tensor]] = WeakKeyDictionary()
        self._current: tuple[Split | None, dict[str, Tensor]] = None, {}  # of a split, beyond the limit

    def watch(self, found: Iterator[Batch], split: Split) -> Generator[Batch, None, None]:
        """Yield the batches of a split, which were not augmented, and know them from then on."""
        for batch in found:
            if self.tails:
                self._sources[batch.x] = _Source(split, batch.rows, batch.x._version)
            yield batch

    def install(self, kind: str, module: nn.Module) -> None:
        """Let a model or extractor of this kind use what is kept, if it has a tail."""
        if kind not in self.tails:
            return
        tail, body = self.tails[kind], extractor_of(module)
        last = nn.Identity() if tail.path is None else body.get_submodule(tail.path)
        whole = body.forward

        def forward(x: Tensor) -> Tensor:
            source = self._sources.get(x)
            if source is None or source.version != x._version:
                return whole(x)
            compute = whole if tail.path is None else partial(_input, whole, last)
            y = last(self._of(kind, source.split, compute)[source.rows])
            return torch.relu(y) if tail.relu else y

        body.forward = forward

    def _of(self, kind: str, split: Split, compute: Forward) -> Tensor:
        """Return the outputs for all rows of a split (n, …); compute them if they are not kept."""
        for kept in (self._outputs.get(split), self._current[1] if self._current[0] is split else None):
            if kept and kind in kept:
                return kept[kind]
        computed: list[Tensor] = []
        with torch.no_grad():
            for batch in batches.batches(split, self._batch, self._normalise):
                self._poll()
                computed.append(compute(batch.x))
        outputs = torch.cat(computed)
        taken = sum(one.nbytes for kept in self._outputs.values() for one in kept.values())
        if taken + outputs.nbytes <= self._limit:
            self._outputs.setdefault(split, {})[kind] = outputs
        else:
            others = self._current[1] if self._current[0] is split else {}
            self._current = split, {**others, kind: outputs}
        return outputs


def _input(whole: Forward, last: nn.Module, x: Tensor) -> Tensor:
    """Return what a module gets as input in the forward pass of the extractor around it."""
    inputs: list[Tensor] = []

    def noted(given: Tensor) -> Tensor:
        inputs.append(given)
        return given

    with replaced(last, noted):
        whole(x)
    return inputs[0]
