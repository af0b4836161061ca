"""A convolutional gate."""

from torch import nn


class Conv(nn.Sequential):
    def __init__(self, shape, experts):
        layers = nn.Conv2d(shape[0], 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        super().__init__(*layers, nn.Linear(4, experts))
