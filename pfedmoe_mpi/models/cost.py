"""Work per sample of a model, for the placement of clients; only ratios matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BATCH = 64  # samples per optimiser step, over which the cost of the step is divided


def multiply_adds(module: nn.Module, shape: tuple[int, ...], tokens: bool = False) -> float:
    """Return the multiply-adds of one sample's forward pass, plus its share of the optimiser's work.

    Args:
        module: a module with input (B, *shape); linear, convolutional and recurrent layers are counted.
        shape: shape of one sample.
        tokens: whether the samples are tokens.
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
    return total + 8 * sum(p.numel() for p in module.parameters() if p.requires_grad) / BATCH
