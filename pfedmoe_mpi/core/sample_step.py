"""DP-SGD: an update in which the gradient of every sample is clipped and noise is added to their sum.

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang: "Deep Learning with Differential Privacy", CCS 2016,
Algorithm 1. An update of B samples (`privacy.sampling` = poisson: of B samples in expectation) has

    (Σ_i g_i · min(1, C / ‖g_i‖) + N(0, z²C² I)) / B

where g_i is the gradient of the method's loss on sample i alone, C is `privacy.clip` and z `privacy.noise`.
The norm is that of all parts which a phase trains together, shared and private: one mechanism of noise
multiplier z covers both. Private parts that nothing sent depends on (`Algorithm.apart`) have a norm of their
own, so that what is shared does not depend on them through the norm either.

Clipping of the whole gradient, momentum, moments and weight decay come after the noise: they do not see the
samples. The noise is float32, drawn on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.copies import to_device
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.sgd import Phase
from pfedmoe_mpi.core.step import Step

Gradients = Mapping[str, Sequence[Any]]  # tensors by part, in the order of its parameters
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}  # of the mean of the samples' gradients, relative to the batch's


class NotPerSampleError(Exception):
    """A client step that reads samples otherwise than by the gradients of single ones; says how."""


@dataclass(frozen=True)
class SamplePrivacy:
    """The settings of DP-SGD. `compare`: check that the batch's gradient is the mean of the samples'."""

    clip: float
    noise: float
    poisson: bool = False
    apart: frozenset[str] = frozenset()  # private parts that nothing sent depends on
    compare: bool = False

    def groups(self, names: Sequence[str]) -> list[list[str]]:
        """Return the parts of a phase whose gradients have one norm: one or two groups of them."""
        inside = [name for name in names if name not in self.apart]
        return [group for group in (inside, [name for name in names if name in self.apart]) if group]


class SampleStep(Step):
    """The updates of one phase. See `Step` for the other arguments.

    Args:
        generator: of the noise, on the CPU.
        expected: B, by which sums are divided; None: the number of samples in the update.
    """

    def __init__(
        self,
        parts: Parts,
        phase: Phase,
        rate: float,
        loss: Callable[[Batch], Tensor],
        autocast: Callable[[], AbstractContextManager[object]],
        poll: Callable[[], None],
        device: torch.device,
        *,
        privacy: SamplePrivacy,
        precision: str,
        generator: torch.Generator,
        expected: float | None,
    ) -> None:
        self._groups = privacy.groups(list(phase.lr))
        super().__init__(parts, phase, rate, loss, autocast, poll, device, self._groups)
        self._parts, self._device = parts, device
        self._privacy, self._precision = privacy, precision
        self._generator, self._expected = generator, expected
        self._names = list(phase.lr)

    def _update(self, group: Sequence[Batch], poll: Callable[[], None]) -> None:
        parameters = {name: self._parts.parameters(name) for name in self._names}
        sums = {name: [torch.zeros_like(p) for p in parameters[name]] for name in self._names}
        for batch in group:
            poll()
            gradients, losses = self.gradients(batch)
            if self._privacy.compare:
                self._compare(batch, gradients, losses)
            self._add_clipped(sums, gradients)
            self._total += losses.double().sum()
        samples = self._expected or sum(map(len, group))
        for (p, total), noise in zip(_pairs(parameters, sums), self._noise(parameters), strict=True):
            p.grad = (total + noise) / samples
        self._optimiser.step()

    def gradients(self, batch: Batch) -> tuple[Gradients, Tensor]:
        """Return the gradients of each sample, a tensor (B, *shape) for each parameter, and losses (B,)."""

        def loss_of_one(values: Gradients, x: Tensor, y: Tensor, row: Tensor) -> Tensor:
            return self._value(values, Batch(x[None], y[None], row[None]))

        each = vmap(grad_and_value(loss_of_one), in_dims=(None, 0, 0, 0))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # some kernels take one by one
            found: tuple[Gradients, Tensor] = each(self._values(), batch.x, batch.y, batch.rows)
        return found

    def _values(self) -> Gradients:
        return {name: [p.detach() for p in self._parts.parameters(name)] for name in self._names}

    def _value(self, values: Gradients, batch: Batch) -> Tensor:
        """Return the loss of a batch as a function of the trained parameters."""

        def loss() -> Tensor:
            with self._autocast():
                return self._loss(batch)

        return self._parts.with_parameters(values, loss)

    def _add_clipped(self, sums: Gradients, gradients: Gradients) -> None:
        """Add the sum over the samples' clipped gradients to `sums`, in place."""
        for names in self._groups:
            own = [gradient for name in names for gradient in gradients[name]]
            if own:
                norms = torch.stack([g.flatten(1).norm(dim=1) for g in own]).norm(dim=0)
                factors = (self._privacy.clip / norms).clamp(max=1.0)
                for total, gradient in zip((t for name in names for t in sums[name]), own, strict=True):
                    total.add_(torch.tensordot(factors, gradient, dims=1))

    def _noise(self, like: Gradients) -> list[Tensor]:
        """Return the noise of every parameter, standard deviation z·C, on the device."""
        shapes = [p.shape for name in self._names for p in like[name]]
        sizes = [shape.numel() for shape in shapes]
        deviation = self._privacy.noise * self._privacy.clip
        drawn = torch.zeros(sum(sizes))
        if deviation:
            drawn.normal_(0.0, deviation, generator=self._generator)
        pieces = to_device(drawn, self._device).split(sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def _compare(self, batch: Batch, gradients: Gradients, losses: Tensor) -> None:
        """Check that the gradient of the batch is the mean of its samples' gradients.

        Raises:
            NotPerSampleError: it is not, or the loss has a gradient to something else.
        """
        if losses.requires_grad:
            raise NotPerSampleError("its loss trains something besides the parts of the phase")
        whole, _ = grad_and_value(self._value)(self._values(), batch)
        expected = torch.cat([g.flatten() for name in self._names for g in whole[name]])
        mean = torch.cat([g.mean(0).flatten() for name in self._names for g in gradients[name]])
        difference, size = float((mean - expected).norm()), float(expected.norm())
        if difference > TOLERANCE[self._precision] * size + 1e-6:
            share = difference / max(size, 1e-12)
            raise NotPerSampleError(
                f"its loss is not a mean over samples: a batch's gradient is {100 * share:.1g} % from the "
                "mean of its samples' gradients"
            )


def _pairs(one: Gradients, other: Gradients) -> list[tuple[Tensor, Tensor]]:
    return [pair for name in one for pair in zip(one[name], other[name], strict=True)]
