"""The gate: how much each expert counts, for every sample, from the raw input."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from pfedmoe_mpi.models.switchnorm import SwitchNorm

NORMS = {"switch": SwitchNorm, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class Gate(nn.Module):
    """Samples (B, ...), flattened to (B, features), to weights (B, experts), float32, each row summing to 1.

    The order of two experts is (shared, local). flatten → normalisation → (Linear → BatchNorm → activation)
    for every layer but the last → Linear → BatchNorm → softmax. Training needs B ≥ 2 wherever a batch is
    normalised.

    Source: pFedMoE (arXiv 2402.01350), H(x; φ); by two independent readings SwitchNorm, two linear layers,
    BatchNorm, sigmoid. The width is not given (readings: 32, 64, 128), hence `hidden`. Departure: a literal
    reading puts the last BatchNorm after the softmax, where the weights would no longer sum to 1. Everything
    is an option because the paper leaves the gate's design open: `input_norm` switch, layer, batch or none,
    `activation` sigmoid, relu, tanh or gelu, `layers` counts linear layers, the last one included.
    """

    def __init__(
        self,
        features: int,
        experts: int = 2,
        *,
        hidden: int = 64,
        layers: int = 2,
        input_norm: str = "switch",
        batch_norm: bool = True,
        activation: str = "sigmoid",
    ) -> None:
        super().__init__()
        self.input_norm = nn.Identity() if input_norm == "none" else NORMS[input_norm](features)
        widths = [features, *[hidden] * (layers - 1), experts]
        parts: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise(widths), start=1):
            parts.append(nn.Linear(before, after))
            if batch_norm:
                parts.append(nn.BatchNorm1d(after))
            if number < layers:
                parts.append(ACTIVATIONS[activation]())
        self.layers = nn.Sequential(*parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.layers(self.input_norm(x.flatten(1)))
        # Under autocast logits are bfloat16, whose weights would sum to 1 within 1 % only.
        return torch.softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))
