"""Construction of an architecture by name, and its check on the meta device before training."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models.names import CNN, LSTM, MLP, MNIST, SIZED, TEXT, TORCHVISION, resolve_name
from pfedmoe_mpi.user_code import TIMM, is_reference

LARGEST_SIDE = 512  # limit of the search for a size that an architecture accepts, in pixels


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
    """Build the extractor `name`, (B, *shape) → (B, dim), initialised from torch's global generator.

    `shape` is (channels, height, width), (features,) or (tokens,); `dim` comes from `resolve_dim`; `stem` is
    small or imagenet, for torchvision's ResNets only; `vocabulary` is the number of different tokens, 0 if
    the samples are not tokens. A reference to the user's own code is built by `user_model.build`.

    Raises:
        ConfigError: there is no such architecture.
        ValueError, RuntimeError: the architecture cannot take `shape`; `check_model` reports it to users.
    """
    assert dim > 0 and stem in {"small", "imagenet"}
    name = resolve_name(name)
    if is_reference(name):
        from pfedmoe_mpi.models import user_model

        return user_model.build(name, shape, dim, vocabulary)
    if name.startswith(TIMM):
        from pfedmoe_mpi.models import timm_model

        return timm_model.build(name, shape, dim)
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
    """Build the extractor `name` with a linear head; arguments and errors as in `build_extractor`."""
    return Model(build_extractor(name, shape, dim, stem, vocabulary), nn.Linear(dim, classes))


def check_model(
    name: str, shape: tuple[int, ...], classes: int, dim: int, stem: str, vocabulary: int = 0
) -> None:
    """Check that `name` takes samples of `shape`.

    It is built without memory on the meta device. This package's constructors raise for a shape they cannot
    take; a network of torchvision also has a training batch of two samples passed through it. A module of the
    user's own is built with memory and tried by `user_model.check`, one of timm by `timm_model.check`.

    Raises:
        ConfigError: there is no such architecture, or it cannot take `shape`; the message has the least
            square size that it takes.
    """
    name = resolve_name(name)
    if is_reference(name):
        from pfedmoe_mpi.models import user_model

        user_model.check(name, shape, dim, vocabulary)
        return
    if name.startswith(TIMM) and not vocabulary:
        from pfedmoe_mpi.models import timm_model

        timm_model.check(name, shape, dim)
        return
    for_text = name in TEXT or name in LSTM
    if for_text != bool(vocabulary):
        if for_text:
            raise ConfigError(
                f"model {name} takes texts, but the samples are not texts",
                "use mlp1 to mlp5, or cnn1 to cnn5 for images",
            )
        raise ConfigError(
            f"model {name} takes numbers, but the samples are texts", f"use {' or '.join(TEXT)}"
        )
    if for_text or _takes(name, shape, classes, dim, stem):
        return
    shape_text = "x".join(map(str, shape))
    if len(shape) != 3:
        raise ConfigError(f"model {name} takes images, not samples of shape {shape_text}", "use mlp1 to mlp5")
    side = _least_side(name, shape, classes, dim, stem)
    if side is None:
        raise ConfigError(
            f"model {name} cannot take {shape_text}, nor any square images up to {LARGEST_SIDE} pixels",
            "use another model",
        )
    least = "the next size it takes is" if name.startswith(SIZED) else "needs at least"
    raise ConfigError(
        f"model {name} cannot take {shape_text}: {least} {shape[0]}x{side}x{side}",
        f"resize the images with `--data.size {side}`, or use another model",
    )


class Weightless(TorchFunctionMode):
    """Torch mode in which `empty`, `ones` and `zeros` use the meta device.

    So building a module takes no memory, no initialisation and no random draw. `torch.device("meta")` would
    also catch the tensors that a constructor computes with (RegNet's widths).
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
            # This package's constructors already raise for a shape they cannot take. A first forward pass on
            # the meta device would import sympy and torch._dynamo: one second at every rank's start.
            return True
        return model(torch.empty(2, *shape, device="meta")).shape == (2, classes)
    except (AssertionError, RuntimeError, ValueError):
        return False


def _least_side(name: str, shape: tuple[int, ...], classes: int, dim: int, stem: str) -> int | None:
    """Return the least side of a square image that `name` takes, up to `LARGEST_SIDE`, else None.

    Networks whose layers depend on the size take only some sizes (multiples of the patch): for them it is the
    least side from `shape` on. The others take every size from the least one, which is found by bisection.
    """

    def fits(side: int) -> bool:
        return _takes(name, (shape[0], side, side), classes, dim, stem)

    if name.startswith(SIZED):
        return next(filter(fits, range(max(shape[1:]), LARGEST_SIDE + 1)), None)
    side = bisect_left(range(LARGEST_SIDE + 1), True, lo=1, key=fits)
    return side if side <= LARGEST_SIDE else None
