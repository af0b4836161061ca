"""How much work a sample is to a model, for placement; only ratios matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BATCH = 64  # samples over which one pass of the optimiser over all parameters is spread


def multiply_adds(module: nn.Module, shape: tuple[int, ...], tokens: bool = False) -> float:
    """Multiply-adds of one sample forward through the layers that multiply, and the optimiser's share.

    Args:
        module: (B, *shape) to anything.
        shape: of one sample.
        tokens: whether samples are tokens.
    """
    total = 0.0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        nonlocal total
        if isinstance(layer, nn.Linear):
            total += output.numel() * layer.in_features
        elif isinstance(layer, nn.Conv2d):
            total += output.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.RNNBase):
            total += output[0].shape[1] * sum(p.numel() for p in layer.parameters() if p.ndim == 2)

    hooks = [layer.register_forward_hook(count) for layer in module.modules()]
    with torch.no_grad():
        module.eval()(torch.zeros(1, *shape, dtype=torch.int32 if tokens else torch.float32))
    for hook in hooks:
        hook.remove()
    return total + 8 * sum(p.numel() for p in module.parameters()) / BATCH
