"""The five CNNs of pFedMoE's experiments and the five of the MNIST family."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from pfedmoe_mpi.models.names import CNN, CNN_SIDE, MNIST


def _after_convolutions(pixels: int) -> int:
    """Return the side in pixels after two times a 5×5 convolution without padding and a 2×2 max-pool."""
    return ((pixels - 4) // 2 - 4) // 2


class ConvExtractor(nn.Module):
    """Extractor from images (B, channels, height, width) to representations (B, dim), dim = width of fc2.

    Source: pFedMoE (arXiv 2402.01350), the table of five CNNs; representation = fc2 after ReLU, d = 500. The
    MNIST family (20 and 20 filters, d = 50) follows the same pattern. Departure without effect on any value:
    max-pool comes before ReLU, which is the same function at a quarter of the work.

    Raises:
        ValueError: `shape` is not (channels, height, width) with sides of at least 16 pixels.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dim: int) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < CNN_SIDE:
            raise ValueError(f"{name} needs images of at least {CNN_SIDE}x{CNN_SIDE} pixels")
        channels, height, width = shape
        conv1, conv2, fc1 = (CNN | MNIST)[name]
        self.conv1 = nn.Conv2d(channels, conv1, 5)
        self.conv2 = nn.Conv2d(conv1, conv2, 5)
        self.fc1 = nn.Linear(conv2 * _after_convolutions(height) * _after_convolutions(width), fc1)
        self.fc2 = nn.Linear(fc1, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        return F.relu(self.fc2(x))
