"""Switchable normalisation of flattened samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

EPS = 1e-5
MOMENTUM = 0.1


class _Normalise(torch.autograd.Function):
    """(x - mean_row - mean_column) / sqrt(var_row + var_column) · weight + bias.

    It is one autograd function because it runs on every batch: autograd's own graph would make more passes
    over the data and keep more temporaries. Rows are (B, 1), columns (D,).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        mean_row, mean_column, var_row, var_column, weight, bias = rest
        scale = (var_row + var_column).rsqrt_()
        normal = (x - mean_row).sub_(mean_column).mul_(scale)
        ctx.save_for_backward(normal, scale, weight)
        return torch.addcmul(bias, normal, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normal, scale, weight = ctx.saved_tensors
        work = grad * normal  # the only temporary of full size, reused below
        grad_weight, grad_bias = work.sum(0), grad.sum(0)
        torch.mul(grad, weight, out=work).mul_(scale)  # the gradient of the centred x
        grad_x = work.clone() if ctx.needs_input_grad[0] else None
        means = -work.sum(1, keepdim=True), -work.sum(0)
        work.mul_(normal).mul_(scale).mul_(-0.5)
        return grad_x, *means, work.sum(1, keepdim=True), work.sum(0), grad_weight, grad_bias


class SwitchNorm(nn.Module):
    """Normalisation of (B, D) by learned mixtures of two statistics: per sample (layer), per feature (batch).

    Mean and variance each have their own softmax weights over (layer, batch), both starting at one half;
    then an affine map per feature. Source: Luo et al., Differentiable Learning-to-Normalize via Switchable
    Normalization, ICLR 2019, section 2, without the instance statistics, which flattened input does not
    have. Departures: running statistics by torch's convention (momentum 0.1, mean from 0, variance from 1,
    unbiased) instead of averages over batches after training. The published code for one dimension has a
    decay of 0.997 and starts the variance at 0, so its statistics are still far off after one epoch.

    Input and output are (B, D), the output in float32 (float64 for float64 input), B ≥ 2 in training.

    Raises:
        ValueError: only one sample in training, which has no batch statistics.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features))
        self.bias = nn.Parameter(torch.empty(features))
        self.mean_weight = nn.Parameter(torch.empty(2))
        self.var_weight = nn.Parameter(torch.empty(2))
        self.register_buffer("running_mean", torch.empty(features))
        self.register_buffer("running_var", torch.empty(features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the values before training."""
        for ones in (self.weight, self.mean_weight, self.var_weight, self.running_var):
            nn.init.ones_(ones)
        for zeros in (self.bias, self.running_mean):
            nn.init.zeros_(zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_layer = x.mean(1, keepdim=True)
        # Two passes, because E[x²] - E[x]² loses all digits of features far from zero. torch.var_mean is
        # exact too, but takes ten times as long on a CPU.
        var_layer = (x - mean_layer).square_().mean(1, keepdim=True)
        mean_batch, var_batch = self.running_mean, self.running_var
        if self.training:
            mean_batch, var_batch = self._batch_statistics(x)
        mean = torch.softmax(self.mean_weight, 0)
        var = torch.softmax(self.var_weight, 0)
        normalised: torch.Tensor = _Normalise.apply(
            x,
            mean[0] * mean_layer,
            mean[1] * mean_batch,
            var[0] * var_layer,
            var[1] * var_batch + EPS,
            self.weight,
            self.bias,
        )
        return normalised

    def _batch_statistics(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and biased variance of every feature, (D,) each; update the running statistics."""
        samples = len(x)
        if samples < 2:
            raise ValueError("SwitchNorm needs at least two samples in training")
        mean = x.mean(0)
        var = (x - mean).square_().mean(0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, MOMENTUM)
            self.running_var.lerp_(var * (samples / (samples - 1)), MOMENTUM)
        return mean, var
