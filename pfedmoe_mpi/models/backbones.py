"""torchvision's classification networks as extractors.

torchvision is imported only when a network is built: the import takes as long as torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Their published initialisation (truncated normal) is slow and prints a warning; with BatchNorm torch's
# default is sufficient.
UNINITIALISED = ("googlenet", "inception_v3")


def build_backbone(name: str, shape: tuple[int, ...], dim: int, stem: str) -> nn.Module:
    """Return the network `name` with random weights: images (B, channels, height, width) to (B, dim).

    Departures from the published networks: the classifier's last layer has `dim` outputs and torch's default
    initialisation (some networks start it at zero). There are no auxiliary heads. If the images do not have 3
    channels, the first convolution is new. `stem` small gives ResNets a first convolution of 3×3, stride 1,
    and no max-pool (He et al., CVPR 2016, section 4.2); imagenet keeps the published one. The layers before
    the last one are kept, such as VGG's two layers of 4096. SqueezeNet's last layer is a 1×1 convolution
    followed by ReLU, so its representation is ≥ 0.

    Raises:
        ValueError: `shape` is not the shape of images, or the network cannot be built for this size.
    """
    from torchvision.models import get_model

    if len(shape) != 3:
        raise ValueError(f"{name} needs images")
    # Every constructor accepts a number of classes. Passing `dim` replaces the classifier by a projection to
    # `dim`, in the same way for every network.
    network: nn.Module = get_model(name, weights=None, num_classes=dim, **_options(name, shape))
    if stem == "small":
        _small_stem(network)
    if shape[0] != 3:
        _replace_first_convolution(network, shape[0])
    _last_layer(network, dim).reset_parameters()
    return network


def _options(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    _, height, width = shape
    if name in UNINITIALISED:
        return {"aux_logits": False, "init_weights": False}
    if name.startswith("maxvit_"):
        return {"input_size": (height, width)}
    if name.startswith("vit_"):
        if height != width:
            raise ValueError(f"{name} needs square images")
        return {"image_size": height}
    return {}


def _small_stem(network: nn.Module) -> None:
    from torchvision.models import ResNet

    if isinstance(network, ResNet):
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()


def _replace_first_convolution(network: nn.Module, channels: int) -> None:
    first = next(part for part in network.modules() if isinstance(part, nn.Conv2d))
    assert first.in_channels == 3 and first.groups == 1
    first.in_channels = channels
    first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, channels, *first.kernel_size))
    first.reset_parameters()


def _last_layer(network: nn.Module, dim: int) -> nn.Linear | nn.Conv2d:
    layer = [part for part in network.modules() if isinstance(part, nn.Linear | nn.Conv2d)][-1]
    assert layer.weight.shape[0] == dim
    return layer


class Embedding(nn.Module):
    """A published network without its last layer: images (B, 1 or 3, height, width) to embeddings (B, width).

    A single channel is repeated three times, so that torchvision's weights fit unchanged.
    """

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        """Build the network with random weights.

        Raises:
            ValueError: `shape` is not that of images of 1 or 3 channels, or the last layer is not linear.
        """
        super().__init__()
        from torchvision.models import get_model

        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(f"{name} needs images of 1 or 3 channels")
        self.network: nn.Module = get_model(name, weights=None, **_options(name, (3, *shape[1:])))
        self.last, layer = [
            (path, part)
            for path, part in self.network.named_modules()
            if isinstance(part, nn.Linear | nn.Conv2d)
        ][-1]
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} does not end in a linear layer")
        self.width = layer.in_features
        self.network.set_submodule(self.last, nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        embedding: torch.Tensor = self.network(x.expand(-1, 3, -1, -1))
        return embedding.flatten(1)
