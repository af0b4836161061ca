"""Builds an architecture by name, and tries it on the meta device before anything is trained."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models.names import CNN, LSTM, MLP, MNIST, SIZED, TEXT, TORCHVISION, resolve_name

LARGEST_SIDE = 512  # where the search for a size an architecture takes ends


class Model(nn.Module):
    """A classifier in two parts: `extractor`, (B, *shape) → (B, d), and `head`, (B, d) → (B, classes)."""

    def __init__(self, extractor: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.extractor = extractor
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.extractor(x))
        return logits


def build_extractor(name: str, shape: tuple[int, ...], dim: int, stem: str, vocabulary: int = 0) -> nn.Module:
    """The extractor `name`, (B, *shape) → (B, dim), initialised from torch's global generator.

    `shape` is (channels, height, width), (features,) or (tokens,); `dim` comes from `resolve_dim`; `stem` is
    small or imagenet, for torchvision's ResNets only; `vocabulary` is how many tokens there are, 0 where
    samples are none.

    Raises:
        ConfigError: there is no such name.
        ValueError, RuntimeError: the architecture cannot take `shape`; `check_model` says it to a user.
    """
    assert dim > 0 and stem in {"small", "imagenet"}
    name = resolve_name(name)
    if name in CNN or name in MNIST:
        from pfedmoe_mpi.models.cnn import ConvExtractor

        return ConvExtractor(name, shape, dim)
    if name in MLP:
        from pfedmoe_mpi.models.mlp import MLPExtractor

        return MLPExtractor(name, shape, dim)
    if name in TEXT or name in LSTM:
        from pfedmoe_mpi.models.text import build_text

        return build_text(name, shape[0], dim, vocabulary)
    from pfedmoe_mpi.models.backbones import build_backbone

    return build_backbone(name, shape, dim, stem)


def build_model(
    name: str, shape: tuple[int, ...], classes: int, dim: int, stem: str, vocabulary: int = 0
) -> Model:
    """The extractor `name` with a linear head; arguments and errors as in `build_extractor`."""
    return Model(build_extractor(name, shape, dim, stem, vocabulary), nn.Linear(dim, classes))


def check_model(
    name: str, shape: tuple[int, ...], classes: int, dim: int, stem: str, vocabulary: int = 0
) -> None:
    """Build `name` without memory, on the meta device, and send a training batch of two samples through it.

    Raises:
        ConfigError: there is no such name, or it cannot take `shape`; names the least square size it takes.
    """
    name = resolve_name(name)
    for_text = name in TEXT or name in LSTM
    if for_text != bool(vocabulary):
        takes, given, use = ("texts", "none", "mlp1 to mlp5, or cnn1 to cnn5 for images")
        if not for_text:
            takes, given, use = ("numbers", "texts", ", ".join(TEXT))
        raise ConfigError(f"model {name} takes {takes}, and these samples are {given}", f"use {use}")
    if for_text or _takes(name, shape, classes, dim, stem):
        return
    given = "x".join(map(str, shape))
    if len(shape) != 3:
        raise ConfigError(f"model {name} takes images, not samples of shape {given}", "use mlp1 to mlp5")
    side = _least_side(name, shape, classes, dim, stem)
    if side is None:
        raise ConfigError(
            f"model {name} takes neither {given} nor {LARGEST_SIDE} pixels", "use another model"
        )
    least = "the next size it takes is" if name.startswith(SIZED) else "needs at least"
    raise ConfigError(
        f"model {name} cannot take {given}: {least} {shape[0]}x{side}x{side}",
        f"bring images to that size with `--data.size {side}`, or use another model",
    )


class Weightless(TorchFunctionMode):
    """Makes what a constructor fills later on the meta device: no memory, no initialisation, no random draw.

    `torch.device("meta")` would take the numbers too that a constructor computes with (RegNet's widths).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.ones, torch.zeros):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _takes(name: str, shape: tuple[int, ...], classes: int, dim: int, stem: str) -> bool:
    try:
        with Weightless():
            model = build_model(name, shape, classes, dim, stem).to("meta")
        if name not in TORCHVISION:
            # Our own constructors refuse what they cannot take; a first forward on the meta device imports
            # sympy and torch._dynamo, a second of every rank's start.
            return True
        return model(torch.empty(2, *shape, device="meta")).shape == (2, classes)
    except (AssertionError, RuntimeError, ValueError):
        return False


def _least_side(name: str, shape: tuple[int, ...], classes: int, dim: int, stem: str) -> int | None:
    """The least side of a square image that `name` takes.

    Where layers depend on the size, only certain sizes will do (multiples of the patch): the least from
    `shape` on. The others take every size from the least one, found by bisection.
    """

    def fits(side: int) -> bool:
        return _takes(name, (shape[0], side, side), classes, dim, stem)

    if name.startswith(SIZED):
        return next(filter(fits, range(max(shape[1:]), LARGEST_SIDE + 1)), None)
    side = bisect_left(range(LARGEST_SIDE + 1), True, lo=1, key=fits)
    return side if side <= LARGEST_SIDE else None
