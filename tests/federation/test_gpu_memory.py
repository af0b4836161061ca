"""GPU memory by given numbers; samples in host memory give the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pfedmoe_mpi.config.sections import Train
from pfedmoe_mpi.conformance.checks import Case, digest
from pfedmoe_mpi.core import batches
from pfedmoe_mpi.core.batches import Normalise, Split
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation import build
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.gpu_memory import (
    BACKWARD,
    LIBRARIES,
    Need,
    Rank,
    estimate,
    saved_bytes,
    stay_in_host_memory,
)
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.mpi import launch

GB = 1e9
CPU = torch.device("cpu")


def rank(gpu: str, samples: float, free: float, models: float = 1.0, step: float = 1.0) -> Rank:
    return Rank(gpu, free * GB, Need(samples * GB, models * GB, step * GB))


def made(method: str = "pfedmoe", **changes: Any) -> Federation:
    settings = Case(method, {}).settings(train__device="cpu", rounds=2, **changes)
    return build.build(launch.start(), settings, warn=False)


# Ranks that share a GPU


def test_samples_that_do_not_fit_stay_in_host_memory() -> None:
    train = Train()
    assert stay_in_host_memory([rank("a", 5, 8)], train) == [False]
    assert stay_in_host_memory([rank("a", 6, 8)], train) == [True], "the libraries need memory, too"
    two = [rank("a", 5, 8), rank("b", 5, 8)]
    assert stay_in_host_memory(two, train) == [False, False]
    shared = [rank("a", 5, 14), rank("b", 5, 8), rank("a", 5, 13)]
    assert stay_in_host_memory(shared, train) == [True, False, True], "14 GB and twice the libraries"
    assert stay_in_host_memory([rank("", 1, 0), rank("a", 1, 8)], train) == [False, False]
    assert stay_in_host_memory(two, Train(samples_in="host")) == [True, True]


def test_what_does_not_fit_is_refused_with_what_fits() -> None:
    with pytest.raises(ConfigError, match=r"train.samples_in = gpu, but rank 1 need") as error:
        stay_in_host_memory([rank("", 1, 0), rank("a", 6, 8)], Train(samples_in="gpu"))
    assert "--train.samples_in auto" in error.value.remedy
    with pytest.raises(ConfigError, match=r"batch = 64: the 3 ranks from rank 0 on need 7.6 GB") as error:
        stay_in_host_memory([rank("a", 0, 6)] * 3, Train(batch=64))
    assert "at most 2 ranks per GPU" in error.value.remedy
    with pytest.raises(ConfigError) as error:
        stay_in_host_memory([rank("a", 0, 4, step=6)], Train(batch=64))
    assert error.value.remedy == "--train.batch 16 --train.accumulate 4"
    with pytest.raises(ConfigError) as error:
        stay_in_host_memory([rank("a", 0, 1)], Train(batch=64))
    assert "a GPU with more memory" in error.value.remedy


def test_need_counts_samples_models_gradients_momenta_and_a_step() -> None:
    federation = made("fedavg", model__pool="mlp5")
    size = federation.state_layout.size
    need = estimate(federation.task, federation.method, 100, 200)
    assert need.samples == 100 * 200 and need.models == 4 * 3 * size
    assert need.step == BACKWARD * saved_bytes(federation.task, "mlp5")
    assert need.total == need.samples + need.models + need.step + LIBRARIES
    adam = made("fedavg", model__pool="mlp5", train__optimiser="adam")
    assert estimate(adam.task, adam.method, 0, 0).models == 4 * 4 * size
    graphs = made("fedavg", model__pool="mlp5", train__graphs="on")
    assert estimate(graphs.task, graphs.method, 100, 200) == need, "one architecture has one graph"
    own = made("pfedmoe", model__pool="mlp5,mlp4", model__shared="mlp5")
    sizes = {layout.digest: layout.size for layout in own.client_layouts}
    bound = own.state_layout.size + sum(sizes.values()) - min(own.client_layouts[0].sizes["gate"], 10**9)
    trained = own.state_layout.size + max(sizes.values())
    assert estimate(own.task, own.method, 0, 0).models == 4 * (bound + 2 * trained), "one gate for both"
    captured = made("pfedmoe", model__pool="mlp5,mlp4", model__shared="mlp5", train__graphs="on")
    assert estimate(captured.task, captured.method, 0, 0).models == 4 * 3 * bound


def test_saved_bytes_are_those_of_a_real_forward_pass() -> None:
    federation = made("fedavg", model__pool="cnn5", data__size=16)
    module = federation.task.extractor("cnn5").build()
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(torch.zeros(16, *federation.task.shape))
    places = {t.untyped_storage().data_ptr(): t for t in found.values()}
    real = sum(t.numel() * t.element_size() for t in places.values())
    weights = sum(4 * p.numel() for p in module.parameters())
    assert output.requires_grad
    assert real - weights <= saved_bytes(federation.task, "cnn5") <= real


def test_a_cpu_has_no_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    assert made(train__graphs="on").engine.graphs is None
    assert capsys.readouterr().err == "note: train.graphs = on has no effect on a CPU\n"


# Samples in host memory


@pytest.mark.parametrize("augment", [(), ("flip", "crop")])
def test_each_batch_is_under_way_while_the_one_before_is_used(augment: tuple[str, ...]) -> None:
    x = torch.rand(50, 3, 8, 8)
    taken: list[int] = []

    class Seen(Tensor):
        """Samples that record when rows of them are read."""

        def __getitem__(self, rows: Any) -> Tensor:
            taken.append(len(rows))
            return self.as_subclass(Tensor)[rows]

    normalise = Normalise((), (), 3, CPU)
    split = Split(x, torch.arange(50))
    plain = list(batches.epoch(split, 16, normalise, augment, torch.Generator().manual_seed(3)))
    streamed = Split(x.as_subclass(Seen), split.y, streamed=True)
    ready = []
    for expected, batch in zip(
        plain, batches.epoch(streamed, 16, normalise, augment, torch.Generator().manual_seed(3)), strict=True
    ):
        ready.append(len(taken))
        assert torch.equal(batch.x, expected.x) and torch.equal(batch.rows, expected.rows)
        assert batch.x.stride() == expected.x.stride()
    assert ready == [2, 3, 4, 4]


def test_samples_in_host_memory_give_the_same_bits() -> None:
    found = []
    for where in ("auto", "host"):
        federation = made("fedjets", train__samples_in=where, stream__kind="abrupt", stream__round=2)
        loop = Loop(launch.start(), federation, SilentObserver(), None)
        assert loop.run() and federation.streamed == (where == "host")
        found.append(digest(loop))
    assert found[0] == found[1]
