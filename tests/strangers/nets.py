"""Models as a user has them: a vision transformer and a residual network, written for another program."""

from blocks import Residual, patches
from torch import nn


class TinyViT(nn.Module):
    """Patches of 4 × 4 pixels, two transformer blocks, the mean over patches."""

    def __init__(self, shape, dim, width=16):
        super().__init__()
        self.patches = patches(shape[0], width)
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(width, dim)

    def forward(self, x):
        return self.out(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def small_resnet(shape, dim):
    """Return three residual blocks with BatchNorm, whose two last share their weights."""
    shared = Residual(8)
    return nn.Sequential(
        nn.Conv2d(shape[0], 8, 3, padding=1),
        Residual(8),
        shared,
        shared,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, dim),
    )
