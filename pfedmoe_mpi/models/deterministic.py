"""Layers without a deterministic CUDA kernel, in an equal form that has one.

Of the layers for which `torch.use_deterministic_algorithms` raises an error, published networks for images
have one: adaptive average pooling to more than one pixel (AlexNet, VGG).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AdaptiveAveragePool(nn.AdaptiveAvgPool2d):
    """Adaptive average pooling of (B, C, H, W) as two matrix products: over the rows, then over the columns.

    A window is a product of an interval of rows and one of columns, so that its mean is the mean of means.
    """

    def forward(self, x: Tensor) -> Tensor:
        size = self.output_size
        high, wide = size if isinstance(size, tuple) else (size, size)
        return _means(x, 2, high) @ x @ _means(x, 3, wide).T


def _means(x: Tensor, axis: int, outputs: int | None) -> Tensor:
    """Return the matrix (outputs, inputs) of the means of adaptive pooling along an axis of x.

    Output i is the mean of the inputs from ⌊i·inputs/outputs⌋ up to ⌈(i + 1)·inputs/outputs⌉, excluded.
    """
    inputs = x.shape[axis]
    outputs = outputs or inputs
    numbers = torch.arange(outputs, device=x.device)[:, None]
    first, end = numbers * inputs // outputs, ((numbers + 1) * inputs + outputs - 1) // outputs
    places = torch.arange(inputs, device=x.device)
    return ((places >= first) & (places < end)).to(x.dtype) / (end - first)


def replace(module: nn.Module) -> None:
    """Give a module's layers that have no deterministic CUDA kernel their equal form, in place."""
    for part in module.modules():
        if type(part) is nn.AdaptiveAvgPool2d and part.output_size not in (1, (1, 1)):
            part.__class__ = AdaptiveAveragePool
