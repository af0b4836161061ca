"""Gradient inversion: samples whose gradient points where that of a client points.

Zhu, Liu and Han 2019 (Deep Leakage from Gradients) find samples by matching gradients; Geiping, Bauermeister,
Dröge and Moeller 2020 (Inverting Gradients) match their direction by the cosine, add the total variation of
the image, and descend by the sign of the gradient. This is the latter, with one difference: the server does
not know the client's private head and gate, so the gradient with respect to the shared module's output is an
unknown, too, and is found together with the samples. For a whole model, where this gradient is
softmax − label, it takes the place of the labels.

A step of one sample needs no descent if the first layer is linear with a bias: its gradients are δ xᵀ and δ,
so that x is their quotient, whatever follows (Phong, Aono, Hayashi, Wang and Moriai 2018, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

STEP = 0.1  # of the descent, in standard deviations of the normalised samples
VARIATION = 0.01  # weight of the total variation
STARTS = 2  # random starts, of which the best match counts
EXACT = 0.01  # 1 − cosine below which a quotient needs no descent
DECAY = (3 / 8, 5 / 8, 7 / 8)  # shares of the steps after which the step is a tenth, as Geiping et al.


def invert(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    gradient: Tensor,
    bounds: tuple[Tensor, Tensor],
    samples: int,
    steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """Return samples (B, *shape) that explain a gradient, and 1 − the cosine that they reach.

    Args:
        module: the shared module with the values from before the step.
        parameters: its trained parameters, in the order of the gradient.
        gradient: of its vector (size,), up to a factor: parameters first, then buffers, which are not used.
        bounds: the least and the largest normalised sample, each (1, *shape).
    """
    module.train()
    for each in module.modules():
        if isinstance(each, nn.Dropout):
            each.eval()  # its draw is the client's secret
    for parameter in parameters:
        parameter.requires_grad_(True)
    sizes = [parameter.numel() for parameter in parameters]
    wanted = gradient[: sum(sizes)].to(parameters[0].device)
    found = _quotient(parameters, wanted, bounds) if samples == 1 else []
    if not any(distance < EXACT for _, distance in found):
        found += [
            _descend(module, parameters, wanted / wanted.norm(), bounds, samples, steps, generator)
            for _ in range(STARTS)
        ]
    return min(found, key=lambda pair: pair[1])


def _quotient(
    parameters: Sequence[nn.Parameter], wanted: Tensor, bounds: tuple[Tensor, Tensor]
) -> list[tuple[Tensor, float]]:
    """Return the one sample that the gradients of a linear first layer give, [] for another first layer.

    With noise it is the least-squares solution over the layer's units; with it 1 − the cosine of the layer's
    gradient.
    """
    low, high = bounds
    if [each.shape[1:].numel() for each in parameters[:2]] != [low[0].numel(), 1] or parameters[0].ndim != 2:
        return []
    weight = wanted[: parameters[0].numel()].view_as(parameters[0]).double()
    bias = wanted[parameters[0].numel() :][: len(weight)].double()
    if parameters[1].shape != bias.shape or not bool(bias.any()):
        return []
    x = weight.T @ bias / (bias @ bias)
    distance = 1 - float((weight.T @ bias).norm() / (weight.norm() * bias.norm()))
    return [(x.float().view_as(low).clamp(low, high), distance)]


def _descend(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    wanted: Tensor,
    bounds: tuple[Tensor, Tensor],
    samples: int,
    steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    low, high = bounds
    x = torch.randn((samples, *low.shape[1:]), generator=generator).to(low.device)
    x = x.clamp(low, high).requires_grad_(True)
    with torch.no_grad():
        shape = module(torch.cat([x, x])).shape[1:]
    upstream = (0.1 * torch.randn((samples, *shape), generator=generator)).to(low.device).requires_grad_(True)
    optimiser = torch.optim.Adam([x, upstream], lr=STEP)
    distance = torch.tensor(2.0)
    for step in range(steps):
        if step in {int(share * steps) for share in DECAY}:
            optimiser.param_groups[0]["lr"] *= 0.1
        value = (module(x) * upstream).sum()
        gradients = torch.autograd.grad(value, list(parameters), create_graph=True, allow_unused=True)
        flat = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten()
                for p, g in zip(parameters, gradients, strict=True)
            ]
        )
        distance = 1 - (flat @ wanted) / (flat.norm() + 1e-12)
        goal = distance + VARIATION * _variation(x)
        x.grad, upstream.grad = torch.autograd.grad(goal, [x, upstream])
        x.grad = x.grad.sign()
        optimiser.step()
        with torch.no_grad():
            x.clamp_(low, high)
    result = float(distance.detach())
    return x.detach().clone(), result if math.isfinite(result) else 2.0


def _variation(x: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels; 0 for samples that are not images."""
    if x.ndim != 4:
        return x.new_zeros(())
    return x.diff(dim=3).abs().mean() + x.diff(dim=2).abs().mean()
