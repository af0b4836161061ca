"""Architectures: the papers' definitions, and all shapes of data."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models import names, registry

SMALL = "small"


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# The CNNs of the paper


@pytest.mark.parametrize(
    ("name", "ten", "hundred", "extractor"),
    [
        ("cnn1", 2_621_558, 2_666_648, 2_616_548),
        ("cnn2", 1_815_142, 1_860_232, 1_810_132),
        ("cnn3", 1_320_558, 1_365_648, 1_315_548),
        ("cnn4", 1_060_358, 1_105_448, 1_055_348),
        ("cnn5", 670_058, 715_148, 665_048),
    ],
)
def test_cnns_have_the_papers_parameter_counts(name: str, ten: int, hundred: int, extractor: int) -> None:
    dim = names.resolve_dim([name], 0)
    assert parameters(registry.build_model(name, (3, 32, 32), 10, dim, SMALL)) == ten
    assert parameters(registry.build_model(name, (3, 32, 32), 100, dim, SMALL)) == hundred
    assert parameters(registry.build_extractor(name, (3, 32, 32), dim, SMALL)) == extractor


@pytest.mark.parametrize(
    ("name", "fc1"), [(f"mnist{k}", w) for k, w in enumerate((300, 200, 150, 100, 50), 1)]
)
def test_mnist_models_have_their_layers(name: str, fc1: int) -> None:
    model = registry.build_model(name, (1, 28, 28), 10, names.resolve_dim([name], 0), SMALL)
    shapes = [tuple(parameter.shape) for parameter in model.parameters() if parameter.dim() > 1]
    assert shapes == [(20, 1, 5, 5), (20, 20, 5, 5), (fc1, 20 * 4 * 4), (50, fc1), (10, 50)]


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 32, 32), (2, 17, 40)])
def test_cnn_has_the_published_layer_order(shape: tuple[int, ...]) -> None:
    model = registry.build_model("cnn3", shape, 10, 500, SMALL)
    x = torch.randn(4, *shape)
    w = dict(model.extractor.named_parameters())
    y = F.max_pool2d(F.relu(F.conv2d(x, w["conv1.weight"], w["conv1.bias"])), 2)
    y = F.max_pool2d(F.relu(F.conv2d(y, w["conv2.weight"], w["conv2.bias"])), 2)
    y = F.relu(F.linear(y.flatten(1), w["fc1.weight"], w["fc1.bias"]))
    y = F.relu(F.linear(y, w["fc2.weight"], w["fc2.bias"]))
    assert torch.equal(model.extractor(x), y)
    assert torch.equal(model(x), F.linear(y, model.head.weight, model.head.bias))


@pytest.mark.parametrize("name", ["cnn1", "cnn5", "mnist2", "mlp1", "mlp5"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 32, 32), (13,)])
def test_representations_have_length_dim(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) == 1 and not name.startswith("mlp"):
        with pytest.raises(ConfigError, match=rf"model {name} takes images, not samples of shape 13"):
            registry.check_model(name, shape, 4, 24, SMALL)
        return
    registry.check_model(name, shape, 4, 24, SMALL)
    model = registry.build_model(name, shape, 4, 24, SMALL)
    x = torch.randn(5, *shape)
    assert model.extractor(x).shape == (5, 24)
    assert model.extractor(x).min() >= 0  # the representation ends in ReLU
    assert model(x).shape == (5, 4)


def test_mlps_differ_and_the_fifth_is_the_smallest() -> None:
    counts = [parameters(registry.build_extractor(f"mlp{k}", (13,), 500, SMALL)) for k in range(1, 6)]
    assert counts == sorted(set(counts), reverse=True)


# Names and lengths


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ("cnn_3", "cnn3"),
        ("CNN-3", "cnn3"),
        ("resnet_18", "resnet18"),
        ("wide_resnet50_2", "wide_resnet50_2"),
        ("regnet_x_1_6gf", "regnet_x_1_6gf"),  # without underscores the same as regnet_x_16gf
        ("regnet_x_16gf", "regnet_x_16gf"),
    ],
)
def test_spellings_of_names_are_accepted(given: str, known: str) -> None:
    assert names.resolve_name(given) == known


@pytest.mark.parametrize(
    ("given", "meant"), [("resnet17", "resnet18"), ("cnnn3", "cnn3"), ("vit_b16x", "vit_b_16")]
)
def test_unknown_model_suggests_the_nearest(given: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"there is no model '{given}'; did you mean '{meant}'\?"):
        registry.check_model(given, (3, 32, 32), 10, 500, SMALL)


def test_ambiguous_spelling_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no model 'regnetx16gf'"):
        names.resolve_name("regnetx16gf")


def test_backbone_list_equals_torchvision() -> None:
    from torchvision import models

    assert sorted(names.TORCHVISION) == models.list_models(module=models)


def test_names_import_no_torch_and_models_no_torchvision() -> None:
    code = """
import sys
from pfedmoe_mpi.models import names
names.resolve_dim(["cnn1", "resnet18", "vit_b_16"], 0), names.auto_pool((3, 32, 32)), names.names()
assert "torch" not in sys.modules
from pfedmoe_mpi.models import registry
registry.check_model("cnn1", (3, 32, 32), 10, 500, "small")
registry.build_model("cnn5", (3, 32, 32), 10, 500, "small")
assert not {"torchvision", "sympy", "torch._dynamo"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_representation_lengths_are_resolved() -> None:
    assert names.native_dim("cnn2") == names.native_dim("mlp4") == 500
    assert names.native_dim("mnist_2") == 50
    assert names.native_dim("resnet18") is None
    assert names.resolve_dim(["cnn1", "mlp2", "resnet18"], 0) == 500
    assert names.resolve_dim(["mnist1", "resnet18", "mnist5"], 0) == 50
    assert names.resolve_dim(["resnet18"], 0) == 500
    assert names.resolve_dim(["cnn1", "mnist1"], 64) == 64
    wider = registry.build_extractor("mnist1", (1, 28, 28), 64, SMALL)
    assert wider(torch.zeros(2, 1, 28, 28)).shape == (2, 64)


def test_different_lengths_are_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match=r"cnn1 has 500 and mnist3 has 50.*\n.*--model\.dim 500"):
        names.resolve_dim(["cnn1", "resnet18", "mnist3"], 0)


def test_auto_models_fit_the_data() -> None:
    cnns, mlps = tuple(f"cnn{k}" for k in range(1, 6)), tuple(f"mlp{k}" for k in range(1, 6))
    assert names.auto_pool((3, 32, 32)) == names.auto_pool((1, 16, 16)) == cnns
    assert names.auto_pool((1, 15, 16)) == names.auto_pool((13,)) == mlps
    assert names.auto_shared((3, 32, 32)) == "cnn5" and names.auto_shared((13,)) == "mlp5"


def test_cnn_takes_16_pixels_and_no_fewer() -> None:
    assert registry.build_extractor("cnn5", (1, 16, 16), 9, SMALL)(torch.zeros(2, 1, 16, 16)).shape == (2, 9)
    with pytest.raises(ConfigError, match="model cnn5 cannot take 1x15x30: needs at least 1x16x16"):
        registry.check_model("cnn5", (1, 15, 30), 10, 500, SMALL)


# torchvision backbones

LEAST = {"alexnet": 63, "inception_v3": 75, "maxvit_t": 221, "vit_h_14": 42}  # of those that cannot take 32


@pytest.mark.parametrize("name", names.TORCHVISION)
def test_backbone_takes_small_images_or_names_the_least_size(name: str) -> None:
    """An odd `dim` makes the last layer distinguishable from others of the same width."""
    before = torch.get_rng_state()
    if name not in LEAST:
        registry.check_model(name, (3, 32, 32), 10, 37, SMALL)
    else:
        least = LEAST[name]
        with pytest.raises(ConfigError, match=rf"model {name} cannot take 3x32x32: .* 3x{least}x{least}\n"):
            registry.check_model(name, (3, 32, 32), 10, 37, SMALL)
        registry.check_model(name, (3, least, least), 10, 37, SMALL)
    assert torch.equal(torch.get_rng_state(), before)  # trying a model draws nothing


def test_unusable_image_sizes_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="model vit_b_16 cannot take 1x28x28: the next size it takes is 1x32x32"
    ):
        registry.check_model("vit_b_16", (1, 28, 28), 10, 50, SMALL)
    with pytest.raises(ConfigError, match=r"model vit_b_16 cannot take 3x32x48: .* 3x48x48"):
        registry.check_model("vit_b_16", (3, 32, 48), 10, 50, SMALL)
    with pytest.raises(ConfigError, match="model vgg11 cannot take 1x8x8: needs at least 1x32x32"):
        registry.check_model("vgg11", (1, 8, 8), 10, 50, SMALL)
    with pytest.raises(ConfigError, match="model resnet18 takes images, not samples of shape 13"):
        registry.check_model("resnet18", (13,), 10, 50, SMALL)
    registry.check_model("resnet18", (1, 8, 8), 10, 50, SMALL)
    registry.check_model("resnet18", (2, 32, 48), 10, 50, "imagenet")


@pytest.mark.parametrize("channels", [1, 3])
def test_resnet18_trains(channels: int) -> None:
    model = registry.build_model("resnet18", (channels, 32, 32), 10, 20, SMALL)
    logits = model(torch.randn(2, channels, 32, 32))
    F.cross_entropy(logits, torch.tensor([1, 2])).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_small_images_get_a_small_stem() -> None:
    def first(stem: str) -> tuple[int, ...]:
        network: Any = registry.build_extractor("resnet18", (3, 32, 32), 20, stem)
        at_layer1: list[tuple[int, ...]] = []
        network.layer1.register_forward_pre_hook(lambda _, args: at_layer1.append(tuple(args[0].shape[2:])))
        network.eval()(torch.zeros(1, 3, 32, 32))
        return (*network.conv1.weight.shape, *at_layer1[0])

    assert first("small") == (64, 3, 3, 3, 32, 32)
    assert first("imagenet") == (64, 3, 7, 7, 8, 8)


def test_projection_does_not_start_at_zero() -> None:
    """torchvision's ViTs start their classifier at zero, which would give all samples one representation."""
    extractor = registry.build_extractor("vit_b_32", (1, 32, 32), 20, SMALL).eval()
    representation = extractor(torch.randn(2, 1, 32, 32))
    assert representation.std() > 0.01


@pytest.mark.parametrize(
    "name",
    ["squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small", "mnasnet0_5", "googlenet", "swin_v2_t"],
)
def test_backbone_trains_on_views_of_one_vector(name: str) -> None:
    """Parameters and float buffers become views, as in a federation: same output, and training works."""
    model = registry.build_model(name, (1, 32, 32), 10, 20, SMALL)
    x = torch.randn(2, 1, 32, 32).contiguous(memory_format=torch.channels_last)
    expected = model.eval()(x)
    tensors: list[torch.Tensor] = [*model.parameters()]
    tensors += [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    vector = torch.cat([tensor.detach().flatten() for tensor in tensors])
    offset = 0
    for tensor in tensors:
        tensor.data = vector[offset : offset + tensor.numel()].view(tensor.shape)
        offset += tensor.numel()
    assert torch.equal(model(x), expected)
    before = vector.clone()
    F.cross_entropy(model.train()(x), torch.tensor([1, 2])).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    weights = parameters(model)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert gradient.any() and torch.equal(vector[:weights], before[:weights].sub(gradient, alpha=0.1))
    normalised = any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    assert torch.equal(vector[weights:], before[weights:]) != normalised  # running statistics are in it
    vector.zero_()
    assert not model.head(model.extractor(x)).any()
