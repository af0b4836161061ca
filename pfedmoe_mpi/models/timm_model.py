"""The image networks of the package timm as extractors, `timm:NAME`; no weights are downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pfedmoe_mpi.errors import ConfigError, nearest
from pfedmoe_mpi.models import generators
from pfedmoe_mpi.user_code import TIMM


def build(name: str, shape: tuple[int, ...], dim: int) -> nn.Module:
    """Return the network `timm:NAME` with random weights: images (B, channels, height, width) to (B, dim).

    The last layer has `dim` outputs. A network that is made for one size is made for that of the samples.

    Raises:
        ConfigError: timm has no such network, or the samples are not images.
        ValueError, RuntimeError: the network cannot be built for this size.
    """
    import timm

    own = name.removeprefix(TIMM)
    if not timm.is_model(own):
        problem = f"timm has no model '{own}'{nearest(own, timm.list_models())}"
        raise ConfigError(problem, "list its names: python -c 'import timm; print(timm.list_models())'")
    if len(shape) != 3:
        problem = f"model {name} takes images, not samples of shape {'x'.join(map(str, shape))}"
        raise ConfigError(problem, "use mlp1 to mlp5")
    settings: dict[str, Any] = {"pretrained": False, "in_chans": shape[0], "num_classes": dim}
    try:
        network: nn.Module = timm.create_model(own, img_size=shape[1:], **settings)
    except TypeError:  # it takes any size, and has no such setting
        network = timm.create_model(own, **settings)
    return network


def check(name: str, shape: tuple[int, ...], dim: int) -> None:
    """Check that a network takes samples of `shape`, by a training batch of two.

    Raises:
        ConfigError: it does not.
    """
    with generators.kept():
        try:
            output = build(name, shape, dim).train()(torch.randn(2, *shape))
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            reason = str(error).partition("\n")[0]
            problem = f"model {name} cannot take {'x'.join(map(str, shape))}: {reason}"
            raise ConfigError(problem, "resize the images with --data.size, or use another model") from error
    if not isinstance(output, Tensor) or output.shape != (2, dim):
        raise ConfigError(f"model {name} does not return one vector per sample", "use another model")
