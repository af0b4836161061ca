"""One client's step as `traffic_check` records it, and the search for private numbers in what it sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pfedmoe_mpi.core.turn import Turn


class RecordedStep:
    """The values a client's step returned, the private vector it left, and its batch losses."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.samples = turn.samples
        self.epochs: list[list[float]] = []  # of the last phase: the sum of the losses, and the samples
        self.values: dict[str, torch.Tensor] = {}
        self.vector = torch.empty(0)
        self._by_sample = turn._engine.samples is not None
        self._poisson = turn._engine.samples is not None and turn._engine.samples.poisson
        turn._epoch = self._beginning(turn._epoch)  # type: ignore[method-assign]
        if self._by_sample:
            turn._step = self._recording(turn._step)  # type: ignore[method-assign]

    def record_sgd(
        self, sgd: Callable[..., int], phase: Any, loss: Any = None, *more: Any, **named: Any
    ) -> int:
        """Run `Turn.sgd` and record every batch's loss, in place of those of an earlier phase."""
        own, parts = self.turn._loss, self.turn.parts
        self.epochs = []

        def recorded_loss(batch: Any) -> torch.Tensor:
            value: torch.Tensor = loss(batch) if loss else own(parts, batch)
            self._add(float(value.detach().double()) * len(batch), len(batch))
            return value

        return sgd(phase, loss if self._by_sample else recorded_loss, *more, **named)

    def _recording(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Return `Turn._step` of DP-SGD, whose updates record the losses: a loss sees one sample there."""

        def made(*arguments: Any) -> Any:
            step = make(*arguments)
            gradients = step.gradients

            def recorded(batch: Any) -> Any:
                found = gradients(batch)
                self._add(float(found[1].double().sum()), len(batch))
                return found

            step.gradients = recorded
            return step

        return made

    def _beginning(self, epoch: Callable[..., Any]) -> Callable[..., Any]:
        """Return `Turn._epoch`, which says when an epoch begins."""

        def begun(phase: Any) -> Any:
            self.epochs.append([0.0, 0])
            return epoch(phase)

        return begun

    def _add(self, total: float, samples: int) -> None:
        self.epochs[-1][0] += total
        self.epochs[-1][1] += samples

    def loss(self) -> float:
        """Return the mean loss per sample of the last epoch, if it is incomplete with that before it."""
        epochs = [epoch for epoch in self.epochs if epoch[1]]
        whole = self._poisson or [n for _, n in epochs[-1:]] == [self.samples]
        counted = epochs[-1:] if whole else epochs[-2:]
        samples = sum(number for _, number in counted)
        return sum(total for total, _ in counted) / samples if samples else float("nan")


def contains_affine(haystack: np.ndarray, needle: np.ndarray) -> bool:
    """Return whether a stretch of (n,) is a·needle + b with a ≠ 0; too few numbers prove nothing."""
    size, length = len(needle), len(haystack)
    if not size:
        return False
    varied = needle != np.median(needle)
    if length < size or not np.isfinite(needle).all() or varied.sum() < 16:
        return False
    centred = needle - needle.mean()
    width = 1 << (length + size - 1).bit_length()
    spectrum = np.fft.rfft(haystack - haystack.mean(), width) * np.fft.rfft(centred[::-1], width)
    products = np.fft.irfft(spectrum, width)[size - 1 : length]
    sums, squares = (np.concatenate([[0.0], np.cumsum((haystack - haystack.mean()) ** k)]) for k in (1, 2))
    spread = squares[size:] - squares[:-size] - (sums[size:] - sums[:-size]) ** 2 / size
    norm = np.sqrt(np.maximum(spread, 0.0)) * np.linalg.norm(centred)
    for place in np.flatnonzero(np.abs(products) > 0.999 * norm):  # a few large numbers can make it so
        stretch = haystack[place : place + size]
        a = np.dot(stretch - stretch.mean(), centred) / np.dot(centred, centred)
        rest = np.abs(stretch - stretch.mean() - a * centred)[varied]
        if a and np.median(rest) < 1e-4 * np.median(np.abs(a * centred[varied])):
            return True
    return False
