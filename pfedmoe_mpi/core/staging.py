"""The way of clients' vectors to a GPU: through a fixed number of buffers in pinned memory, used in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BUFFERS = 2  # one can be filled while the copy from the other is under way


class Staging:
    """Buffers for vectors of up to `size` numbers; without a GPU there are none.

    Pinned memory cannot be swapped and is slow to allocate, so that not every vector can have its own.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        number = BUFFERS if device.type == "cuda" and size else 0
        self.buffers = [torch.empty(size).pin_memory() for _ in range(number)]
        self._sent = [torch.cuda.Event() for _ in self.buffers]
        self._next = 0

    @contextmanager
    def staged(self, vector: Tensor) -> Iterator[Tensor]:
        """Yield a copy of the vector in pinned memory; copies to the GPU must be started in the block."""
        if not self.buffers or not vector.numel():
            yield vector
            return
        number, self._next = self._next, (self._next + 1) % len(self.buffers)
        self._sent[number].synchronize()
        yield self.buffers[number][: vector.numel()].copy_(vector)
        self._sent[number].record()
