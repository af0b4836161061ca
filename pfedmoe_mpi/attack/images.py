"""How near reconstructed images come to the true ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW = 7  # pixels; the side of SSIM's windows
MOST = 8  # images of a batch: all orders are tried


@dataclass(frozen=True)
class Likeness:
    """Means over a batch of images with values in [0, 1]; `ssim` is NaN for samples that are not images."""

    mse: float
    psnr: float
    ssim: float


def matched(found: Tensor, true: Tensor) -> Tensor:
    """Return `found` (B, *shape) in the order that is nearest to `true` by squared error.

    A gradient does not say in which order samples were in a batch.
    """
    errors = ((found[:, None] - true[None]) ** 2).flatten(2).mean(2).tolist()
    orders = permutations(range(len(true)))
    best = min(orders, key=lambda order: sum(errors[i][place] for place, i in enumerate(order)))
    return found[list(best)]


def likeness(found: Tensor, true: Tensor) -> Likeness:
    """Return how near images (B, *shape), values in [0, 1], come to the true ones in the same order.

    The PSNR is the mean over images of 10·log10(1 / MSE), at most 100 dB.
    """
    mse = ((found - true) ** 2).flatten(1).mean(1).double()
    psnr = 10 * torch.log10(1 / mse.clamp(min=1e-10))
    return Likeness(float(mse.mean()), float(psnr.mean()), ssim(found, true))


def ssim(found: Tensor, true: Tensor) -> float:
    """Return the mean structural similarity, NaN for samples that are not images.

    Wang, Bovik, Sheikh and Simoncelli 2004, with uniform windows, K1 = 0.01 and K2 = 0.03.
    """
    if true.ndim != 4:
        return float("nan")
    a, b = found.double(), true.double()
    side = min(WINDOW, *true.shape[2:])

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, side, stride=1)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    shared = mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + c1) * (2 * shared + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())
