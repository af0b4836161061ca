"""Multilayer perceptrons for feature vectors, and for images too small for a CNN."""

from __future__ import annotations

from math import prod

import torch
from torch import nn
from torch.nn import functional as F

from pfedmoe_mpi.models.names import MLP


class MLPExtractor(nn.Module):
    """Extractor from samples (B, *shape), flattened, to representations (B, dim).

    No paper gives these widths. They follow the five CNNs: two layers, each followed by ReLU, that differ in
    the width of fc1 (1000, 800, 600, 400, 200); representation = fc2.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(prod(shape), MLP[name])
        self.fc2 = nn.Linear(MLP[name], dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))
