"""A client's samples on its device, and the batches drawn from them.

Samples keep the type of the data (uint8, float32, or int32 tokens). A batch is gathered, normalised and
augmented on the device, so there is no loader process. Every random number comes from a CPU generator with
the batch's address, so a batch is the same on every device. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice, pairwise

import numpy as np
import torch
from torch import Tensor

from pfedmoe_mpi.core import augment as changes
from pfedmoe_mpi.core.copies import ahead, host_copy, to_device

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Batch:
    """Samples for one step: x (B, *shape) normalised float32 (tokens: unchanged int32), y (B,) int64.

    `rows` (B,) are the samples' positions in the client's split.
    """

    x: Tensor
    y: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Split:
    """Samples of one client and one purpose: x (n, *shape) uint8, float32 or int32, y (n,) int64.

    y is on the device, and so is x, unless it is `streamed`: then it stays in host memory, pinned if there is
    a GPU, and comes to the device by batch, one batch ahead.
    """

    x: Tensor
    y: Tensor
    streamed: bool = False

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, device: torch.device, streamed: bool = False) -> Split:
        """Return copies of the arrays on the device."""
        return cls(torch.from_numpy(x.copy()), torch.from_numpy(y.copy()), streamed).to(device)

    def to(self, device: torch.device) -> Split:
        """Return the split on the device; x in host memory if it is streamed."""
        x = host_copy(self.x, device) if self.streamed else self.x.to(device)
        return replace(self, x=x, y=self.y.to(device))

    def empty(self) -> Split:
        """Return a split of the same types and shapes without samples."""
        return self.rows(slice(0, 0))

    def rows(self, chosen: Tensor | slice) -> Split:
        """Return the split of these rows, (m,) int64 on any device or a slice."""
        on_x, on_y = chosen, chosen
        if isinstance(chosen, Tensor):
            on_x, on_y = chosen.to(self.x.device), chosen.to(self.y.device)
        return replace(self, x=self.x[on_x], y=self.y[on_y]).to(self.y.device)

    def pieces(
        self, on_device: Sequence[Tensor | slice], on_host: Sequence[Tensor | slice]
    ) -> Iterator[Tensor]:
        """Yield on the device the samples of each piece of rows, which are given there and on the CPU."""
        if self.streamed:
            return ahead(self.x, on_host, self.y.device)
        return (self.x[rows] for rows in on_device)

    def __len__(self) -> int:
        return len(self.y)


class Normalise:
    """A map from raw samples to float32: uint8 to [0, 1], minus mean, over std, each per channel.

    int32 tokens are not changed.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], rank: int, device: torch.device) -> None:
        shape = (1, -1, *[1] * (rank - 1))
        self._mean = torch.tensor(mean, device=device).view(shape) if mean else None
        self._scale = 1 / torch.tensor(std, device=device).view(shape) if std else None

    def __call__(self, raw: Tensor) -> Tensor:
        """Return the result in new memory, because bits may depend on the alignment of a kernel's input."""
        if raw.dtype == torch.int32:
            return raw.clone(memory_format=torch.contiguous_format)
        x = raw.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if raw.dtype == torch.uint8:
            x.div_(255)
        if self._mean is not None and self._scale is not None:
            x.sub_(self._mean).mul_(self._scale)
        return channels_last(x)


def channels_last(x: Tensor) -> Tensor:
    """Return images with exactly the strides of channels-last memory; other tensors unchanged.

    With one channel several strides describe the same memory. `contiguous` keeps any of them, and torch
    chooses between kernels of different rounding by the strides, so bits would depend on where the samples
    came from.
    """
    if x.ndim != 4:
        return x
    channels, high, wide = x.shape[1:]
    strides = (channels * high * wide, 1, wide * channels, channels)
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def batches(split: Split, size: int, normalise: Normalise) -> Generator[Batch, None, None]:
    """Yield the split once, in order, for evaluations."""
    pieces = [slice(start, min(start + size, len(split))) for start in range(0, len(split), size)]
    for piece, raw in zip(pieces, split.pieces(pieces, pieces), strict=True):
        rows = torch.arange(piece.start, piece.stop, device=split.y.device)
        yield Batch(normalise(raw), split.y[piece], rows)


def epoch(
    split: Split, size: int, normalise: Normalise, augment: Sequence[str], generator: torch.Generator
) -> Generator[Batch, None, None]:
    """Yield the split once, shuffled.

    A smaller last batch is kept, but a last batch of one sample joins the batch before it. An epoch's random
    numbers are drawn at once and go to the device in one copy. One that ends early leaves the generator as if
    only the numbers of its batches had been drawn.
    """
    order = torch.randperm(len(split), generator=generator)
    starts = list(range(0, len(split), size))
    if len(starts) > 1 and len(split) - starts[-1] == 1:
        starts.pop()
    pieces = [slice(*ends) for ends in zip(starts, [*starts[1:], len(split)], strict=True)]
    return _gathered(split, order, pieces, normalise, augment, generator)


def poisson(
    split: Split,
    updates: int,
    expected: float,
    size: int,
    normalise: Normalise,
    augment: Sequence[str],
    generator: torch.Generator,
) -> Generator[tuple[Batch, ...], None, None]:
    """Yield the batches of `updates` updates; each draws every sample independently of the others.

    An update has `expected` samples in expectation, in batches of at most `size`; it may have none.
    """
    drawn = torch.rand((updates, len(split)), generator=generator) < expected / len(split)
    ends = [0, *drawn.sum(1).cumsum(0).tolist()]
    of_updates = [
        [slice(start, min(start + size, end)) for start in range(begin, end, size)]
        for begin, end in pairwise(ends)
    ]
    pieces = [piece for each in of_updates for piece in each]
    with closing(_gathered(split, drawn.nonzero()[:, 1], pieces, normalise, augment, generator)) as found:
        for each in of_updates:
            yield tuple(islice(found, len(each)))


def _gathered(
    split: Split,
    order: Tensor,
    pieces: Sequence[slice],
    normalise: Normalise,
    augment: Sequence[str],
    generator: torch.Generator,
) -> Generator[Batch, None, None]:
    """Yield the batches at these pieces of rows (m,), in their order and without gaps."""
    images = bool(augment) and split.x.ndim == 4
    drawn = generator.get_state() if images else None
    places = changes.draw(split.x.shape[1:], _draws(len(order), generator)) if images else ()
    numbers = to_device(torch.stack([order, *places]), split.y.device)
    on_device = [numbers[0, piece] for piece in pieces]
    used = 0
    try:
        for raw, piece, rows in zip(
            split.pieces(on_device, [order[piece] for piece in pieces]), pieces, on_device, strict=True
        ):
            used = piece.stop
            x = normalise(raw)
            if images:
                x = channels_last(changes.apply(x, augment, numbers[1:, piece]))
            yield Batch(x, split.y[rows], rows)
    finally:
        if drawn is not None and used < len(order):
            generator.set_state(drawn)
            _draws(used, generator)


def _draws(samples: int, generator: torch.Generator) -> Tensor:
    """Return the random numbers of so many samples' changes, (samples, DRAWS)."""
    return torch.rand((samples, changes.DRAWS), generator=generator)
