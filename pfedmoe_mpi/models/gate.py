"""The gate: a weight for every expert and sample, from the raw input."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import nn

from pfedmoe_mpi.models.switchnorm import SwitchNorm

NORMS = {"switch": SwitchNorm, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
POOLED_SIDE = 8
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class Gate(nn.Module):
    """Gate from samples (B, ...), flattened to (B, features), to float32 weights (B, experts) of row sum 1.

    The order of two experts is (shared, local). flatten → normalisation → (Linear → BatchNorm → activation)
    for every layer but the last → Linear → BatchNorm → softmax. Training needs B ≥ 2 if any layer normalises
    over the batch.

    Source: pFedMoE (arXiv 2402.01350), H(x; φ); by two independent readings SwitchNorm, two linear layers,
    BatchNorm, sigmoid. The paper does not give the width (readings: 32, 64, 128), hence `hidden`. Departure:
    a literal reading puts the last BatchNorm after the softmax, where the weights would no longer sum to 1.
    Everything is an option because the paper leaves the gate's design open: `input_norm` is switch, layer,
    batch or none; `activation` is sigmoid, relu, tanh or gelu; `layers` counts linear layers, including the
    last; the softmax is over logits divided by `temperature`.

    `routing` top1 uses only the best expert of each sample: the weights are one-hot in the forward pass, and
    the backward pass has the softmax's gradient (straight-through, Bengio, Léonard, Courville, arXiv
    1308.3432).

    `start` says how the gate begins. With paper the last BatchNorm has gain 1, so that logits have variance 1
    over samples from the first step on, and α differs at random (standard deviation 0.27). With even the
    first logits are 0, so that every expert has the same weight for every sample: the last BatchNorm begins
    with gain 0, or without `batch_norm` the last linear layer with weights and bias 0.
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
        temperature: float = 1.0,
        routing: str = "soft",
        start: str = "paper",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.top1 = routing == "top1"
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
        self.even = start == "even"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set what `start` says; after all draws, so that everything else begins as with `paper`."""
        if self.even:
            for parameter in self.layers[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _weights(self.layers(self.input_norm(x.flatten(1))), self.temperature, self.top1)


def _weights(logits: torch.Tensor, temperature: float, top1: bool) -> torch.Tensor:
    """Return the gate's weights (B, experts), float32, from its logits."""
    # Under autocast the logits are bfloat16, and bfloat16 weights sum to 1 only within 1 %.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    weights = torch.softmax(logits, 1)
    return _straight_through(weights) if top1 else weights


def _straight_through(weights: torch.Tensor) -> torch.Tensor:
    """Return the exact one-hot of the largest weight, with the gradient of the weights."""
    hard = torch.zeros_like(weights).scatter_(1, weights.argmax(1, keepdim=True), 1.0)
    return hard + (weights - weights.detach())


class FixedGate(nn.Module):
    """Gate with the same weights (B, experts) for all samples: equal, or learned (static fusion)."""

    def __init__(self, experts: int, learned: bool) -> None:
        super().__init__()
        self.experts = experts
        self.logits = nn.Parameter(torch.zeros(experts)) if learned else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(self.experts, device=x.device) if self.logits is None else self.logits
        return torch.softmax(logits, 0).expand(len(x), self.experts)


class PooledGate(nn.Module):
    """A gate on images (B, C, H, W) that are averaged down to `side` × `side`."""

    def __init__(self, gate: nn.Module, side: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(side)
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights: torch.Tensor = self.gate(self.pool(x))
        return weights


class UserGate(nn.Module):
    """A gate whose logits (B, experts) a module of the user's own computes; the rest is as in `Gate`."""

    def __init__(self, module: nn.Module, *, temperature: float = 1.0, routing: str = "soft") -> None:
        super().__init__()
        self.temperature = temperature
        self.top1 = routing == "top1"
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _weights(self.module(x), self.temperature, self.top1)


def input_shape(shape: tuple[int, ...], dim: int, input: str) -> tuple[int, ...]:
    """Return the shape of a gate's input, for samples of `shape` and representations of length `dim`."""
    if input == "shared":
        return (dim,)
    side = min(POOLED_SIDE, *shape[1:]) if input == "pooled" else 0
    return (shape[0], side, side) if side else shape


def build_gate(
    shape: tuple[int, ...],
    dim: int,
    experts: int,
    *,
    module: str = "",
    input: str = "raw",
    weights: str = "sample",
    **options: Any,
) -> nn.Module:
    """Build the gate of the section [gate]: (B, *shape), or (B, dim) for `input` shared, to (B, experts)."""
    if weights != "sample":
        return FixedGate(experts, learned=weights == "learned")
    seen = input_shape(shape, dim, input)
    if module:
        from pfedmoe_mpi.models import user_model

        kept = {name: options[name] for name in ("temperature", "routing") if name in options}
        gate: nn.Module = UserGate(user_model.build(module, seen, experts), **kept)
    else:
        gate = Gate(prod(seen), experts, **options)
    return PooledGate(gate, seen[-1]) if input == "pooled" else gate
