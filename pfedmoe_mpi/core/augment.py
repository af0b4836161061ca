"""Random changes of training images: flip, erase, crop.

Where each sample is changed is drawn and computed on the CPU, an epoch at a time and in whole numbers. So it
is the same for every device, and no device has to wait for it.

Source: code that pFedMoE's authors released with other papers of the same protocol.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DRAWS = 8  # random numbers per sample, whatever changes are chosen
PADDING = 4  # pixels around an image that is cropped


def draw(shape: Sequence[int], draws: Tensor) -> Tensor:
    """Return where samples are changed, int64 (7, n): flipped, top, bottom, left, right, row, column.

    `flipped` is 0 or 1. The pixels from top to bottom and from left to right, the last ones excluded, are
    erased; all four are 0 where none are. The cut of the padded image begins at (row, column). A rectangle is
    erased with probability 1/2: 0.04 to 0.2 of the image, ratio 0.5 to 2 (log-uniform).

    Args:
        shape: of a sample, (C, H, W).
        draws: uniform random numbers, float32 (n, DRAWS), on the CPU.
    """
    high, wide = shape[1:]
    area = (0.04 + 0.16 * draws[:, 2]) * high * wide
    ratio = torch.exp(math.log(0.5) + (math.log(2.0) - math.log(0.5)) * draws[:, 3])
    tall = (area * ratio).sqrt().round().clamp(1, high)
    broad = (area / ratio).sqrt().round().clamp(1, wide)
    top, left = (draws[:, 4] * (high - tall + 1)).floor(), (draws[:, 5] * (wide - broad + 1)).floor()
    erased = draws[:, 1] < 0.5
    window = [torch.where(erased, edge, 0.0) for edge in (top, top + tall, left, left + broad)]
    cut = draws[:, 6:8] * (2 * PADDING + 1)
    return torch.stack([(draws[:, 0] < 0.5).long(), *(n.long() for n in (*window, *cut.unbind(1)))])


def apply(x: Tensor, names: Sequence[str], places: Tensor) -> Tensor:
    """Return normalised images (B, C, H, W) after those of flip, erase, crop that are named, in this order.

    Args:
        places: the columns of `draw` for these samples, int64 (7, B), on the device of x.
    """
    flipped, top, bottom, left, right, row, column = places
    if "flip" in names:
        x = torch.where(flipped.view(-1, 1, 1, 1) > 0, x.flip(3), x)
    if "erase" in names:
        x = _erase(x, top, bottom, left, right)
    return _crop(x, row, column) if "crop" in names else x


def _erase(x: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Set a rectangle of each image to 0; its edges are int64 (B,)."""
    high, wide = x.shape[2:]
    rows, columns = torch.arange(high, device=x.device), torch.arange(wide, device=x.device)
    inside_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < right[:, None])
    return x.masked_fill((inside_rows[:, :, None] & inside_columns[:, None, :]).unsqueeze(1), 0.0)


def _crop(x: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Cut a window of the image's size out of each image padded with zeros."""
    high, wide = x.shape[2:]
    padded = torch.nn.functional.pad(x, (PADDING,) * 4)
    rows = top[:, None] + torch.arange(high, device=x.device)
    columns = left[:, None] + torch.arange(wide, device=x.device)
    images = torch.arange(len(x), device=x.device)
    cut = padded.permute(0, 2, 3, 1)[images[:, None, None], rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2)
