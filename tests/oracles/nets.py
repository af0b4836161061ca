"""The architectures of the hand-written rounds in plain torch.nn, loaded by the names of their tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dense(nn.Module):
    """Two fully connected layers, each with ReLU; with `norm` BatchNorm before the first."""

    def __init__(self, features: int, hidden: int, d: int, *, norm: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.norm = nn.BatchNorm1d(hidden) if norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc2(torch.relu(self.norm(self.fc1(torch.flatten(x, 1))))))


class Convolutions(nn.Module):
    """Two 5×5 convolutions, each with ReLU and then 2×2 max-pooling; then two fully connected layers."""

    def __init__(self, channels: int, filters: tuple[int, int], flat: int, fc1: int, d: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters[0], 5)
        self.conv2 = nn.Conv2d(filters[0], filters[1], 5)
        self.fc1 = nn.Linear(flat, fc1)
        self.fc2 = nn.Linear(fc1, d)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = F.max_pool2d(torch.relu(self.conv2(x)), 2)
        return torch.relu(self.fc2(torch.relu(self.fc1(torch.flatten(x, 1)))))


class Model(nn.Module):
    """Head ∘ extractor."""

    def __init__(self, extractor: nn.Module, d: int, classes: int) -> None:
        super().__init__()
        self.extractor = extractor
        self.head = nn.Linear(d, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.extractor(x))


class SwitchNorm(nn.Module):
    """Luo et al. 2019, equations 3 and 4, with layer and batch statistics of (B, D)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.mean_weight = nn.Parameter(torch.ones(2))
        self.var_weight = nn.Parameter(torch.ones(2))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        layer = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        if self.training:
            batch = x.mean(0), x.var(0, unbiased=False)
            with torch.no_grad():
                self.running_mean.copy_(0.9 * self.running_mean + 0.1 * batch[0])
                self.running_var.copy_(0.9 * self.running_var + 0.1 * x.var(0, unbiased=True))
        else:
            batch = self.running_mean, self.running_var
        w, v = torch.softmax(self.mean_weight, 0), torch.softmax(self.var_weight, 0)
        mean = w[0] * layer[0] + w[1] * batch[0]
        var = v[0] * layer[1] + v[1] * batch[1]
        return (x - mean) / torch.sqrt(var + 1e-5) * self.weight + self.bias


class Gate(nn.Module):
    """SwitchNorm → Linear → BatchNorm → sigmoid → Linear → BatchNorm → softmax: (shared, local)."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.input_norm = SwitchNorm(features)
        self.layers = nn.Sequential(
            nn.Linear(features, hidden),
            nn.BatchNorm1d(hidden),
            nn.Sigmoid(),
            nn.Linear(hidden, 2),
            nn.BatchNorm1d(2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.layers(self.input_norm(torch.flatten(x, 1))), 1)


def loaded(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module with these parameters and float buffers; every name must fit."""
    result = module.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, strict=False)
    assert not result.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in result.missing_keys)
    return module


def extractor(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Sizes from the tensors' shapes."""
    d, fc1 = tensors["fc2.weight"].shape
    flat = tensors["fc1.weight"].shape[1]
    if "conv1.weight" not in tensors:
        return loaded(Dense(flat, fc1, d, norm="norm.weight" in tensors), tensors)
    conv1, channels = tensors["conv1.weight"].shape[:2]
    return loaded(Convolutions(channels, (conv1, len(tensors["conv2.weight"])), flat, fc1, d), tensors)


def model(tensors: Mapping[str, Tensor]) -> nn.Module:
    prefix = "extractor."
    inner = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    classes, d = tensors["head.weight"].shape
    return loaded(Model(extractor(inner), d, classes), tensors)


def gate(tensors: Mapping[str, Tensor]) -> nn.Module:
    hidden, features = tensors["layers.0.weight"].shape
    return loaded(Gate(features, hidden), tensors)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and float buffers by name."""
    return {name: t.detach() for name, t in module.state_dict().items() if t.is_floating_point()}
