"""Recorded operations of client steps, against torch's counter around the steps of real rounds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_backward_flop

from pfedmoe_mpi import algorithms, config
from pfedmoe_mpi.config import methods
from pfedmoe_mpi.federation import operations
from pfedmoe_mpi.federation.loop import Loop
from pfedmoe_mpi.models import registry
from pfedmoe_mpi.report import costs
from pfedmoe_mpi.report.load import Run
from support.small_federation import build_loop, write_data

OPTIONS: dict[str, dict[str, Any]] = {
    # With all of an update's energy there are no factors, whose number depends on the data.
    "fedkd": {"fedkd__energy_start": 1.0, "fedkd__energy_end": 1.0},
    "fedjets": {"fedjets__common_epochs": 1},
}


def backward_in_groups(y: Any, x: Any, weight: Any, *how: Any, out_shape: Any = None) -> int:
    """Return torch's count of one group times their number; torch's own ignores groups."""
    *others, groups, wanted = how

    def one(shape: Any) -> list[int]:
        return [shape[0], shape[1] // groups, *shape[2:]]

    of_group = [weight[0] // groups, *weight[1:]]
    formula: Any = conv_backward_flop
    count = formula.__wrapped__(one(y), one(x), of_group, *others, 1, wanted, [one(x), of_group])
    return int(groups * count)


@contextmanager
def torch_counter() -> Iterator[FlopCounterMode]:
    """Count by torch's counter, without kernels that it does not know: those of a CPU for whole layers."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch.backends.mha.set_fastpath_enabled(False)
    formulas = {torch.ops.aten.convolution_backward: backward_in_groups}
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            yield counter
    finally:
        torch._C._set_mkldnn_enabled(before)
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "small.h5", 8)


def recorded(loop: Loop) -> list[float]:
    """Return what a report says of each round."""
    found = operations.record(loop.federation)
    settings = config.flatten(loop.federation.config.model_dump(mode="json"))
    run = Run(Path(), settings, loop.history, [{"event": "start", "operations": found}])
    return [count or 0.0 for count in costs.operations(run)]


def counted(loop: Loop) -> list[float]:
    """Train all rounds, and return the operations of each that torch counts in the client steps."""
    method, rounds = loop.federation.method, [0.0] * loop.federation.config.rounds
    step = method.client_step

    def counted_step(turn: Any) -> Any:
        with torch_counter() as counter:
            values = step(turn)
        rounds[turn.round - 1] += counter.get_total_flops()
        return values

    method.client_step = counted_step  # type: ignore[method-assign]
    assert loop.run()
    return rounds


@pytest.mark.parametrize("method", methods.names())
def test_recorded_operations_are_those_of_real_rounds(method: str, small: Path) -> None:
    """To 2 %, over unlike numbers of samples, several epochs, last batches of other sizes, all roles."""
    pool = "mlp5" if algorithms.load(method).homogeneous else "mlp5,mlp4"
    models = {"model__pool": pool, "model__shared": "mlp5"}
    loop = build_loop(small, method, rounds=2, train__batch=24, **models, **OPTIONS.get(method, {}))
    found = counted(loop)
    assert min(found) > 1e6 and recorded(loop) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("fedproto", {"model__train": "lora"}),
        ("fedproto", {"model__train": "head"}),
        ("fedrep", {"model__train": "head", "model__keep_outputs": False}),
        ("standalone", {"train__steps": 7, "train__accumulate": 2, "train__precision": "bf16"}),
    ],
)
def test_frozen_layers_and_counted_updates(method: str, settings: dict[str, Any], small: Path) -> None:
    """Frozen layers have no gradient, kept outputs are computed once, LoRA's products once a batch."""
    loop = build_loop(small, method, rounds=2, model__pool="mlp5", model__shared="mlp5", **settings)
    found = counted(loop)
    assert min(found) > 1e6 and recorded(loop) == pytest.approx(found, rel=0.02)


def test_roles_that_clients_have_yet_to_prepare_are_not_guessed(small: Path) -> None:
    loop = build_loop(small, "fedjets", model__pool="mlp5", fedjets__anchors="clusters")
    assert operations.record(loop.federation) is None


IMAGES = (3, 32, 32)
ARCHITECTURES = [  # one of every family
    *[(name, IMAGES, 0) for name in ("cnn1", "mnist5", "resnet18", "resnext50_32x4d", "mobilenet_v3_small")],
    *[(name, IMAGES, 0) for name in ("vgg11", "squeezenet1_1", "googlenet", "densenet121", "convnext_tiny")],
    *[
        (name, IMAGES, 0)
        for name in ("mnasnet0_5", "shufflenet_v2_x0_5", "regnet_y_400mf", "efficientnet_b0")
    ],
    *[(name, IMAGES, 0) for name in ("vit_b_16", "swin_t", "swin_v2_t", "timm:vit_tiny_patch16_224")],
    *[("alexnet", (3, 64, 64), 0), ("inception_v3", (3, 96, 96), 0), ("maxvit_t", (3, 224, 224), 0)],
    ("mlp1", (12,), 0),
    *[(name, (9,), 30) for name in ("fasttext", "lstm", "gru", "transformer")],
]


@pytest.mark.parametrize(("name", "shape", "vocabulary"), ARCHITECTURES)
def test_architectures_are_counted_as_torch_does(name: str, shape: tuple[int, ...], vocabulary: int) -> None:
    """Images without memory, on the meta device; texts on the CPU, which has kernels for whole layers."""
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    device = "cpu" if vocabulary else "meta"
    x = torch.zeros(2, *shape, dtype=torch.int32 if vocabulary else torch.float32, device=device)
    if vocabulary:
        model = registry.build_model(name, shape, 4, 8, "small", vocabulary)
    else:
        with registry.Weightless():
            model = registry.build_model(name, shape, 4, 8, "small").to("meta")

    with torch_counter() as expected:
        model(x).sum().backward()
    with operations.counting() as found:
        model(x).sum().backward()
    assert found.total == pytest.approx(expected.get_total_flops(), rel=0.02) and found.total > 1e3


def test_evaluations_of_attention_are_counted() -> None:
    """Without gradients torch has one kernel for a whole layer."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with operations.counting() as counter, torch.no_grad():
        layer(torch.zeros(3, 5, 8))
    assert counter.total == 2 * 3 * 5 * (4 * 8 * 8 + 2 * 5 * 8 + 2 * 8 * 16)


@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d, nn.Conv1d])
def test_products_that_are_not_computed_have_the_shapes_of_real_ones(layer: Any) -> None:
    torch.manual_seed(0)
    module = layer(6, 9, 3, stride=2, padding=1, groups=3)
    x = torch.randn(2, 6, *([11] if layer is nn.Conv1d else [11, 10]), requires_grad=True)
    y = module(x)
    with operations.counting() as counter:
        zeros = module(x)
        zeros.sum().backward()
    assert zeros.shape == y.shape and not zeros.any() and x.grad is not None and x.grad.shape == x.shape
    places = (x if layer is nn.ConvTranspose2d else y)[0, 0].numel()
    assert counter.total == 3 * 2 * 2 * places * module.weight.numel(), "forward, and two gradients"


def test_counting_leaves_the_federation_and_the_generators_alone(small: Path) -> None:
    loop = build_loop(small, "pfedmoe", model__pool="mlp5", model__shared="mlp5")
    clients = {k: client.vector.clone() for k, client in loop.federation.clients.items()}
    torch.manual_seed(3)
    expected, kernels = torch.rand(3), torch._C._get_mkldnn_enabled()
    torch.manual_seed(3)
    operations.record(loop.federation)
    assert torch.rand(3).equal(expected) and torch._C._get_mkldnn_enabled() == kernels
    assert all(loop.federation.clients[k].vector.equal(vector) for k, vector in clients.items())
