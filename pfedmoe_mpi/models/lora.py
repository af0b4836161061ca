"""Low-rank changes of frozen weights (LoRA), as parametrisations.

Source: Hu et al.: "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1:
W x + α/r · B A x, with A drawn and B zero. Departures: A is drawn as torch draws linear layers; all linear
layers and projections of attention are changed, not only those of queries and values. Where A and B are
shared, each is averaged by itself, as every tensor is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

INSIDE, ORIGINAL = ".parametrizations.", ".original"  # in the names of a parametrised module's tensors


class LowRank(nn.Module):
    """The parametrisation of a weight (outputs, inputs) by W + α/r · B A."""

    def __init__(self, outputs: int, inputs: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.a, math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        changed: Tensor = weight + self.scale * (self.b @ self.a)
        return changed


def add(module: nn.Module, last: tuple[str, ...], rank: int, alpha: float) -> None:
    """Parametrise the weights of linear layers and attentions, except those with the prefixes `last`."""
    for layer, name in list(_weights(module, last)):
        outputs, inputs = getattr(layer, name).shape
        parametrize.register_parametrization(layer, name, LowRank(outputs, inputs, rank, alpha))


def _weights(module: nn.Module, last: tuple[str, ...]) -> Iterator[tuple[nn.Module, str]]:
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and not f"{path}.".startswith(last):
            yield layer, "weight"
        elif isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None:
            yield layer, "in_proj_weight"


def is_factor(name: str) -> bool:
    """Return whether a tensor of this name is A or B."""
    return INSIDE in name and not name.endswith(ORIGINAL)


def plain(name: str) -> str:
    """Return the name that a tensor has without the parametrisation."""
    return name.replace(INSIDE, ".").removesuffix(ORIGINAL) if INSIDE in name else name
