"""Copies from host memory to the device that nobody waits for, and samples that stay in host memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on the device, without waiting for a GPU: from pinned memory."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def host_copy(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor in host memory, pinned if `device` is a GPU."""
    x = x.cpu()
    return x.pin_memory() if device.type == "cuda" and x.numel() else x


def ahead(x: Tensor, pieces: Sequence[Tensor | slice], device: torch.device) -> Iterator[Tensor]:
    """Yield pieces of x, from host memory, on the device; each is under way while the one before is used.

    On a GPU they come on a stream of their own, so that a copy and the training run at the same time.

    Args:
        pieces: rows of x, int64 on the CPU, or slices.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    under_way: tuple[Tensor, torch.cuda.Event | None] | None = None
    for rows in [*pieces, None]:
        arrived, under_way = under_way, None if rows is None else _start(x, rows, device, stream)
        if arrived:
            yield _finish(*arrived)


def _start(
    x: Tensor, rows: Tensor | slice, device: torch.device, stream: torch.cuda.Stream | None
) -> tuple[Tensor, torch.cuda.Event | None]:
    """Gather rows of x, into pinned memory for a GPU, and start their copy; return it with its end."""
    if stream is None:
        return x[rows].to(device), None
    gathered = x[rows]
    if isinstance(rows, Tensor):
        gathered = torch.empty((len(rows), *x.shape[1:]), dtype=x.dtype, pin_memory=True)
        torch.index_select(x, 0, rows, out=gathered)
    with torch.cuda.stream(stream):
        copied = gathered.to(device, non_blocking=True)
        return copied, stream.record_event()


def _finish(copied: Tensor, end: torch.cuda.Event | None) -> Tensor:
    """Return a copy; the GPU's current stream waits for it, this process does not."""
    if end is not None:
        current = torch.cuda.current_stream(copied.device)
        current.wait_event(end)
        copied.record_stream(current)  # its memory is not used anew while this stream needs it
    return copied
