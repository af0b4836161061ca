"""`model.weights` in a federation: every model begins with the file's values, whatever wrote the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation.loop import Loop
from support.six_clients import SETTINGS, write_common_expert, write_six_clients
from support.small_federation import build_loop


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_six_clients(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def common(data: Path) -> Path:
    return write_common_expert(data)


def built(data: Path, method: str, weights: str, **changes: Any) -> Loop:
    return build_loop(data, method, **{**SETTINGS, "model.weights": weights, **changes})


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "fedmix", "ensemble", "fedjets"])
def test_servers_begin_with_the_file(data: Path, common: Path, method: str) -> None:
    """So the baselines of FedJETs begin with its common expert, as in the paper."""
    with h5py.File(common) as file:
        expected = {name: torch.tensor(tensor[()]) for name, tensor in file["model"].items()}
    loop = built(data, method, str(common))
    views = loop.federation.state_layout.views(loop.state)
    models = {name.partition("/")[0] for name in views if name.endswith("/head.bias")} - {"common"}
    assert models
    for part in models:
        for name, tensor in expected.items():
            assert torch.equal(views[f"{part}/{name}"], tensor), f"{part}/{name}"
    assert "mlp5" in loop.federation.pretrained.identity and loop.run()


def test_every_client_begins_with_the_file(data: Path, common: Path, tmp_path: Path) -> None:
    """But draws what the file lacks, so heads of another number of classes differ."""
    with h5py.File(common) as file:
        tensors = {name: torch.tensor(tensor[()]) for name, tensor in file["model"].items()}
    tensors["head.weight"], tensors["head.bias"] = torch.ones(9, 12), torch.ones(9)
    torch.save(tensors, tmp_path / "nine.pt")
    federation = built(data, "standalone", f"mlp5={tmp_path / 'nine.pt'}").federation
    for name, shared in (("model/extractor.fc1.weight", True), ("model/head.weight", False)):
        values = [federation.client_layouts[k].views(federation.clients[k].vector)[name] for k in range(2)]
        assert torch.equal(*values) == shared
    assert "but drawn: head.weight, head.bias" in federation.pretrained.lines[0]


def test_checkpoint_of_fedjets_gives_its_common_expert(data: Path, common: Path, tmp_path: Path) -> None:
    source = build_loop(data, "fedjets", **{**SETTINGS, "fedjets.common": str(common)}, rounds=1)
    source.saver._folder = tmp_path
    assert source.run()
    source.save()
    loop = built(data, "fedavg", str(tmp_path / "round-000001.h5"))
    place = source.federation.state_layout.parts["common"]
    assert torch.equal(loop.state, source.state[place])


@pytest.mark.parametrize(
    ("weights", "pattern"),
    [
        ("missing.pt", "there is no file"),
        ("cnn5={}", r"model\.weights names cnn5, which is not an architecture of this run"),
        ("{},{}", "each needs the name of its architecture"),
        ("mlp5={},MLP5={}", r"model\.weights names MLP5 twice"),
    ],
)
def test_refusals(data: Path, common: Path, weights: str, pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        built(data, "fedavg", weights.replace("{}", str(common)))


def test_start_decides_which_clients_begin_equal(data: Path) -> None:
    """Two of four clients have mlp4; a model's head begins equal in all only with `one`."""

    def begun(start: str) -> list[dict[str, torch.Tensor]]:
        changes = {"model.pool": "mlp4,mlp5", "model.start": start, "gate.hidden": 4}
        federation = build_loop(data, "pfedmoe", **{**SETTINGS, **changes}).federation
        return [federation.client_layouts[k].views(federation.clients[k].vector) for k in range(3)]

    own, architecture, one = map(begun, ("own", "architecture", "one"))
    body, head, gate = "model/extractor.fc1.weight", "model/head.weight", "gate/layers.0.weight"
    for name in (body, head, gate):
        assert not torch.equal(own[0][name], own[2][name]), name
        assert torch.equal(architecture[0][name], architecture[2][name]), name
    assert architecture[0][head].shape == architecture[1][head].shape
    assert not torch.equal(architecture[0][head], architecture[1][head])
    assert torch.equal(one[0][head], one[1][head]) and torch.equal(one[0][body], one[2][body])
    assert torch.equal(one[1][body], architecture[1][body])
