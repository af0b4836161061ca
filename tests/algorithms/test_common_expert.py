"""FedJETs' common expert: its pretraining against the reference, files that hold it, unusable files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from oracles import experts, nets
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.errors import ConfigError, PartitionError
from pfedmoe_mpi.federation.loop import Loop
from support.round_comparison import assert_tensors_agree
from support.six_clients import SETTINGS, SixClients, write_common_expert, write_six_clients
from support.small_federation import build_loop, split_batches


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_six_clients(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def common(data: Path) -> Path:
    return write_common_expert(data)


def reserve(loop: Loop) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    rows, federation = loop.federation.partition.reserved, loop.federation
    it = SixClients(loop, loop.state, {})
    last = np.arange(len(rows)) % 5 == 4
    assert federation.reserved and len(federation.reserved.splits["train"]) == (~last).sum()
    return it._pairs(rows[~last]), it._pairs(rows[last])


@pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
def test_pretraining_matches_the_reference(data: Path, target: float) -> None:
    own = {"common_target": target, "common_share": 0.3, "common_epochs": 4, "common_rate": 0.5}
    flags = {f"fedjets.{k}": v for k, v in own.items()} | {"train.weight_decay": 0.0, "train.clip": 0.0}
    loop = build_loop(data, "fedjets", **{**SETTINGS, **flags}, rounds=1)
    it = SixClients(loop, loop.state.clone(), {})
    (x, y), (tx, ty) = reserve(loop)
    model = nets.model(it.of_state("common"))

    def accuracy() -> float:
        model.eval()
        with torch.no_grad():
            return float((model(tx).argmax(1) == ty).double().mean())

    generator = seeds.torch_generator(0, "batches", 0, -1)
    epochs = [
        [(x[rows], y[rows]) for rows in split_batches(torch.randperm(len(y), generator=generator), 16)]
        for _ in range(4)
    ]
    start = accuracy()
    steps = (
        experts.pretrained(model, epochs, 0.5 * 0.02, lambda: accuracy() >= target) if start < target else 0
    )
    assert loop.begin()
    assert_tensors_agree(it.of_state("common", start=False), nets.tensors(model), "common expert")
    reported = it.of_state("common_accuracy", start=False)[""]
    assert float(reported) == pytest.approx(accuracy()) and (
        accuracy() >= target or steps == 4 * len(epochs[0])
    )
    frozen = loop.state.clone()
    assert loop.run_round()
    place = loop.federation.state_layout.parts["common"]
    assert torch.equal(loop.state[place], frozen[place]), "the common expert is frozen"


def refused(pattern: str, path: Path, **own: Any) -> str:
    loop = build_loop(path, "fedjets", **{**SETTINGS, **{f"fedjets.{k}": v for k, v in own.items()}})
    with pytest.raises(ConfigError, match=pattern) as caught:
        loop.federation.method.check()
    with pytest.raises(ConfigError, match=pattern):
        loop.begin()
    assert "remedy: " in str(caught.value)
    return str(caught.value)


def test_unusable_common_experts_are_refused(data: Path, common: Path, tmp_path: Path) -> None:
    refused("there is no file", data, common=str(tmp_path / "x.h5"))
    refused("has no part common or model: it holds no weights", data, common=str(data))
    (tmp_path / "text.h5").write_text("nothing")
    refused("cannot be opened as HDF5", data, common=str(tmp_path / "text.h5"))
    (tmp_path / "text.pt").write_text("nothing")
    refused("cannot be read as weights", data, common=str(tmp_path / "text.pt"))
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    refused("cannot be read as weights", data, common=str(tmp_path / "module.pt"))
    torch.save({"a": 1}, tmp_path / "other.pt")
    refused("is not a state_dict", data, common=str(tmp_path / "other.pt"))
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    assert "mlp5" in refused("the tensor extractor.* is missing", data, common=str(tmp_path / "linear.pt"))
    assert "--fedjets.common_model" in refused(
        "fc1.weight has shape", data, common=str(common), common_model="mlp4"
    )
    with h5py.File(common) as file:
        tensors = {name: torch.tensor(t[()]) for name, t in file["model"].items()}
    torch.save({**tensors, "more": torch.ones(1)}, tmp_path / "more.pt")
    refused("the tensor more is not part of the architecture", data, common=str(tmp_path / "more.pt"))
    torch.save({**tensors, "head.bias": torch.full((4,), float("nan"))}, tmp_path / "nan.pt")
    refused("head.bias is not finite", data, common=str(tmp_path / "nan.pt"))


def test_damaged_common_experts_are_refused(data: Path, common: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    refused("cannot be read as weights", data, common=str(tmp_path / "empty.pt"))
    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "sparse.pt")
    refused("is not a state_dict", data, common=str(tmp_path / "sparse.pt"))
    raw = common.read_bytes()
    assert raw.count(b"SNOD") > 1, "the file lists its objects in symbol nodes"
    (tmp_path / "damaged.h5").write_bytes(raw.replace(b"SNOD", b"XXXX"))
    refused("cannot be opened as HDF5", data, common=str(tmp_path / "damaged.h5"))
    with h5py.File(tmp_path / "large.h5", "w") as file:
        file.create_dataset("model/fc1.weight", (1 << 44,), "f4", chunks=(1 << 20,))
    refused("model/fc1.weight claims 70,368,744,177,664 bytes", data, common=str(tmp_path / "large.h5"))


def test_too_small_pretraining_share_is_refused(data: Path) -> None:
    with pytest.raises(PartitionError, match="reserves 3 rows for the server"):
        build_loop(data, "fedjets", **{**SETTINGS, "fedjets.common_share": 0.01})


def test_more_experts_than_clients_are_refused(data: Path, common: Path) -> None:
    with pytest.raises(ConfigError, match=r"fedjets\.experts = 7"):
        build_loop(data, "fedjets", **{**SETTINGS, "fedjets.common": str(common), "fedjets.experts": 7})
    own = {"fedjets.common": str(common), "fedjets.experts": 7, "fedjets.anchors_active": 0}
    loop = build_loop(data, "fedjets", **{**SETTINGS, **own, "fedjets.anchors": "clusters"}, rounds=1)
    assert loop.run(), "without anchors no expert needs one"
    assert not loop.federation.method.prepared_size, "nor the clients' mean embeddings"


def test_every_file_format_gives_the_same_expert(data: Path, common: Path, tmp_path: Path) -> None:
    with h5py.File(common) as file:
        tensors: Mapping[str, torch.Tensor] = {n: torch.tensor(t[()]) for n, t in file["model"].items()}
    torch.save(tensors, tmp_path / "plain.pt")
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "wrapped.pth")
    vectors = []
    for path in (common, tmp_path / "plain.pt", tmp_path / "wrapped.pth"):
        loop = build_loop(data, "fedjets", **{**SETTINGS, "fedjets.common": str(path)})
        assert loop.begin()
        vectors.append(loop.state[loop.federation.state_layout.parts["common"]].clone())
    assert torch.equal(vectors[0], vectors[1]) and torch.equal(vectors[0], vectors[2])


def test_torchvision_backbone_weights_are_accepted(data: Path, tmp_path: Path) -> None:
    """The file is resnet18 as torchvision publishes it, for 1000 classes; its last layer is not used."""
    from torchvision.models import resnet18, resnet34

    torch.manual_seed(3)
    network = resnet18(weights=None)
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    own = {"fedjets.common": str(tmp_path / "resnet18.pth"), "fedjets.common_model": "resnet18"}
    loop = build_loop(data, "fedjets", **{**SETTINGS, **own}, rounds=1)
    assert loop.begin()
    federation = loop.federation
    parts = federation.workbench.parts((federation.method.state(), loop.state))
    x = torch.randn(3, 3, 8, 8)
    network.fc = nn.Identity()
    for module in (network, parts.common):
        module.eval()
    with torch.no_grad():
        torch.testing.assert_close(parts.common(x), network(x), rtol=1e-6, atol=1e-6)
    assert loop.run_round() and bool(loop.state[federation.state_layout.parts["gate"]].isfinite().all())
    torch.save(resnet34(weights=None).state_dict(), tmp_path / "resnet34.pth")
    refused(
        "the tensor network.layer1.2.* is not part of",
        data,
        common=str(tmp_path / "resnet34.pth"),
        common_model="resnet18",
    )
