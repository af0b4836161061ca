"""Client steps of FedProto and FedMRL against those of HtFLlib's own clients, on the batches of this program.

HTFLLIB names a checkout of https://github.com/TsingZ0/HtFLlib; without it these tests are skipped. Its files
are replaced by memory, and its reading of data and building of models by batches and copies of models here.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import nets
from oracles.methods import Batches
from support.round_comparison import assert_tensors_agree
from support.small_federation import TrainedFederation, train_federation, write_data

CHECKOUT = os.environ.get("HTFLLIB", "")
PLAIN = {"momentum": 0.0, "weight_decay": 0.0, "clip": 0.0, "lr": 0.03, "lr_shared": 0.03}

pytestmark = pytest.mark.skipif(
    not (Path(CHECKOUT) / "system" / "flcore").is_dir() or not CHECKOUT,
    reason="HTFLLIB does not name a checkout of github.com/TsingZ0/HtFLlib: export HTFLLIB=FOLDER",
)


class Epochs:
    """A loader whose every iteration gives the next epoch's batches."""

    def __init__(self, epochs: list[Batches]) -> None:
        self._epochs = iter(epochs)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(next(self._epochs))


class Split(nn.Module):
    """A model by HtFLlib's names for its halves."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base, self.head = model.extractor, model.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.base(x))

    def tensors(self) -> dict[str, Tensor]:
        named = nets.tensors(self)
        return {name.replace("base.", "extractor."): tensor for name, tensor in named.items()}


class Theirs:
    """A client of HtFLlib and the items that it and its server keep."""

    def __init__(self, module: ModuleType, name: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch):
        self.items: dict[tuple[str, str], Any] = {}
        base = importlib.import_module("flcore.clients.clientbase")
        monkeypatch.setattr(base, "BaseHeadSplit", lambda args, k: Split(model))
        for place in (base, module):
            monkeypatch.setattr(place, "save_item", self._save)
            monkeypatch.setattr(place, "load_item", self._load)
        arguments = SimpleNamespace(
            algorithm="",
            dataset="",
            device="cpu",
            save_folder_name_full="",
            save_folder_name="temp",
            models_folder_name="",
            num_classes=4,
            batch_size=16,
            local_learning_rate=PLAIN["lr"],
            local_epochs=2,
            few_shot=0,
            lamda=1.0,
            feature_dim=12,
            sub_feature_dim=6,
        )
        self.client = getattr(module, name)(arguments, 0, 0, 0, train_slow=False, send_slow=False)

    def _save(self, item: Any, role: str, name: str, path: str = "") -> None:
        self.items[role, name] = deepcopy(item)

    def _load(self, role: str, name: str, path: str = "") -> Any:
        return deepcopy(self.items.get((role, name)))

    def train(self, epochs: list[Batches]) -> None:
        loader = Epochs(epochs)
        self.client.load_train_data = lambda: loader
        self.client.train()

    def right(self, test: tuple[Tensor, Tensor]) -> float:
        """Return its share of right answers."""
        self.client.load_test_data = lambda: [test]
        correct, samples, _ = self.client.test_metrics()
        return float(correct / samples)


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return the function that imports one of HtFLlib's clients; its modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(Path(CHECKOUT) / "system"))
    models = ModuleType("flcore.trainmodel.models")  # its own imports every architecture
    models.BaseHeadSplit = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flcore.trainmodel.models", models)
    known = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - known:
        if name.split(".")[0] in {"flcore", "utils"}:
            del sys.modules[name]


def train(path: Path, method: str, rounds: int, **more: Any) -> TrainedFederation:
    plain = {f"train.{name}": value for name, value in PLAIN.items()}
    return train_federation(path, method, **{"model.pool": "mlp4,mlp5,mlp3", **plain, **more}, rounds=rounds)


def test_fedproto_trains_and_answers_as_theirs(
    clients: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds, the second with prototypes, which are those of this program."""
    more = {"fedproto.answer": "prototype", "participation": 1.0}
    path = write_data(tmp_path / "data.h5", 8)
    first, it = (train(path, "fedproto", rounds, **more) for rounds in (1, 2))
    module = clients("flcore.clients.clientproto")
    prototypes = [
        defaultdict(list, enumerate(one.loop.state.view(4, -1).clone().unbind())) for one in (first, it)
    ]
    for k in range(3):
        theirs = Theirs(module, "clientProto", nets.model(it.of_client(k, "model")), monkeypatch)
        epochs = it.samples[k].epochs
        theirs.train(epochs[0])
        theirs.items["Server", "global_protos"] = prototypes[0]
        theirs.train(epochs[1])
        theirs.items["Server", "global_protos"] = prototypes[1]
        trained = theirs.items["Client_0", "model"].tensors()
        assert_tensors_agree(it.of_client(k, "model", start=False), trained, f"model of client {k}")
        assert theirs.right(it.samples[k].test) == it.loop.history[-1]["clients"]["accuracy"][k]


def test_fedmrl_trains_as_theirs(clients: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One round of one client: theirs does not keep what it learned of its projection."""
    it = train(write_data(tmp_path / "data.h5", 8), "fedmrl", 1, participation=0.3)
    ((k,),) = it.cohorts
    theirs = Theirs(
        clients("flcore.clients.clientmrl"), "clientMRL", nets.model(it.of_client(k, "model")), monkeypatch
    )
    projection = theirs.items["Client_0", "proj"]
    projection.load_state_dict(it.of_client(k, "projector"))
    theirs.items["Server", "global_model"] = Split(nets.model(it.of_state("shared")))
    theirs.train(it.samples[k].epochs[0])
    for part, found in (
        ("model", it.of_client(k, "model", start=False)),
        ("global_model", it.of_state("shared", start=False)),
    ):
        assert_tensors_agree(found, theirs.items["Client_0", part].tensors(), part)
    assert not torch.equal(projection.weight, it.of_client(k, "projector", start=False)["weight"])
    assert theirs.items["Client_0", "proj"] is projection, "as translate says, it is not saved"
