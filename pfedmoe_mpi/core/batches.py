"""A client's samples on its device, and the batches drawn from them.

Samples keep the type of the data (uint8, float32, or int32 tokens). A batch is gathered, normalised and
augmented on the device, so there is no loader process. Every random number comes from a CPU generator with
the batch's address, so a batch is the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
    """Samples of one client and one purpose: x (n, *shape) uint8, float32 or int32, y (n,) int64."""

    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, device: torch.device) -> Split:
        """Return copies of the arrays on the device."""
        return cls(torch.from_numpy(x.copy()).to(device), torch.from_numpy(y.copy()).to(device))

    def empty(self) -> Split:
        """Return a split of the same types and shapes without samples."""
        return Split(self.x[:0], self.y[:0])

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


def batches(split: Split, size: int, normalise: Normalise) -> Iterator[Batch]:
    """Yield the split once, in order, for evaluations."""
    for start in range(0, len(split), size):
        rows = torch.arange(start, min(start + size, len(split)), device=split.y.device)
        yield Batch(normalise(split.x[start : start + size]), split.y[start : start + size], rows)


def epoch(
    split: Split, size: int, normalise: Normalise, augment: Sequence[str], generator: torch.Generator
) -> Iterator[Batch]:
    """Yield the split once, shuffled.

    A smaller last batch is kept, but a last batch of one sample joins the batch before it.
    """
    order = torch.randperm(len(split), generator=generator).to(split.y.device)
    starts = list(range(0, len(split), size))
    if len(starts) > 1 and len(split) - starts[-1] == 1:
        starts.pop()
    for start, stop in zip(starts, [*starts[1:], len(split)], strict=True):
        rows = order[start:stop]
        x = normalise(split.x[rows])
        if augment and x.ndim == 4:
            x = augment_images(x, augment, generator)
        yield Batch(x, split.y[rows], rows)


def augment_images(x: Tensor, names: Sequence[str], generator: torch.Generator) -> Tensor:
    """Augment normalised images (B, C, H, W): flip, erase, crop, in that order.

    Source: code that pFedMoE's authors released with other papers of the same protocol.
    """
    draws = torch.rand((len(x), 8), generator=generator).to(x.device)
    if "flip" in names:
        x = torch.where(draws[:, 0].view(-1, 1, 1, 1) < 0.5, x.flip(3), x)
    if "erase" in names:
        x = _erase(x, draws[:, 1:6])
    if "crop" in names:
        x = _crop(x, draws[:, 6:8])
    return channels_last(x)


def _erase(x: Tensor, draws: Tensor) -> Tensor:
    """Set a rectangle to 0 with probability 1/2: 0.04 to 0.2 of the image, ratio 0.5 to 2 (log-uniform)."""
    high, wide = x.shape[2:]
    area = (0.04 + 0.16 * draws[:, 1]) * high * wide
    ratio = torch.exp(math.log(0.5) + (math.log(2.0) - math.log(0.5)) * draws[:, 2])
    tall = (area * ratio).sqrt().round().clamp(1, high)
    broad = (area / ratio).sqrt().round().clamp(1, wide)
    top, left = (draws[:, 3] * (high - tall + 1)).floor(), (draws[:, 4] * (wide - broad + 1)).floor()
    rows, columns = torch.arange(high, device=x.device), torch.arange(wide, device=x.device)
    inside_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < (left + broad)[:, None])
    erased = inside_rows[:, :, None] & inside_columns[:, None, :] & (draws[:, 0] < 0.5).view(-1, 1, 1)
    return x.masked_fill(erased.unsqueeze(1), 0.0)


def _crop(x: Tensor, draws: Tensor, padding: int = 4) -> Tensor:
    """Cut a window of the image's size from a random place of the image padded with zeros."""
    high, wide = x.shape[2:]
    padded = torch.nn.functional.pad(x, (padding,) * 4)
    top, left = (draws * (2 * padding + 1)).long().unbind(1)
    rows = top[:, None] + torch.arange(high, device=x.device)
    columns = left[:, None] + torch.arange(wide, device=x.device)
    images = torch.arange(len(x), device=x.device)
    return padded.permute(0, 2, 3, 1)[images[:, None, None], rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )
