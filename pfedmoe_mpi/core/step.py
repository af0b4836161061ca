"""One update of a client step: losses and gradients of a group of batches, then the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.sgd import Optimiser, Phase


class Step:
    """The updates of one phase, one call each. Only `read` waits for the device.

    Args:
        rate: factor on the learning rates.
        loss: maps a batch to a scalar, the mean over its samples.
        autocast: the context of the forward pass.
        poll: called before every batch; raises StoppedError.
        groups: as of `Optimiser`.
    """

    def __init__(
        self,
        parts: Parts,
        phase: Phase,
        rate: float,
        loss: Callable[[Batch], torch.Tensor],
        autocast: Callable[[], AbstractContextManager[object]],
        poll: Callable[[], None],
        device: torch.device,
        groups: Sequence[Sequence[str]] = (),
    ) -> None:
        self._loss, self._autocast, self._poll = loss, autocast, poll
        self._optimiser = Optimiser(parts, phase, rate, device, groups)
        self._total = torch.zeros((), dtype=torch.float64, device=device)

    def __call__(self, group: Sequence[Batch]) -> None:
        """Do one update with the mean gradient of the group's batches."""
        self._update(group, self._poll)

    def _update(self, group: Sequence[Batch], poll: Callable[[], None]) -> None:
        self._optimiser.zero_grad()
        samples = sum(map(len, group))
        for batch in group:
            poll()
            with self._autocast():
                value = self._loss(batch)
            (value * (len(batch) / samples) if len(group) > 1 else value).backward()
            self._total += value.detach().double() * len(batch)
        self._optimiser.step()

    def read(self) -> tuple[float, float]:
        """Return the sum of the samples' losses since the last call, and of all gradients' norms so far."""
        total, norms = torch.stack([self._total, self._optimiser.norms]).tolist()
        self._total.zero_()
        return total, norms

    def end(self) -> None:
        """Drop the gradients."""
        self._optimiser.zero_grad()
