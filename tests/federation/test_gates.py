"""What is measured of gates: against plain arithmetic on the models, and on gates that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pfedmoe_mpi.federation.gates import ROWS, GateSum, without_expert
from pfedmoe_mpi.federation.loop import Loop
from support.small_federation import build_loop, write_data_files


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_files(tmp_path_factory.mktemp("gates"))["small"]


def measured(data: Path, method: str, **changes: Any) -> tuple[Loop, dict[str, Any]]:
    """Return a loop after one round, and what the round's row says of gates."""
    loop = build_loop(data, method, rounds=1, participation=1.0, model__shared="mlp5", **changes)
    assert loop.run()
    gate: dict[str, Any] = loop.history[-1]["gate"]
    return loop, gate


def pfedmoe(parts: Any, x: Tensor) -> tuple[Tensor, Any]:
    """Return pFedMoE's weights (n, 2), and its answer under any weights."""
    r = torch.stack([parts.shared(x), parts.model.extractor(x)], 1)
    return parts.gate(x), lambda w: parts.model.head((w[:, :, None] * r).sum(1))


def fedjets(parts: Any, x: Tensor) -> tuple[Tensor, Any]:
    """Return the weights (n, 3) of FedJETs with the two best experts of three, and its answer."""
    g = parts.gate(parts.common.extractor(x))
    best = g.double().sum(0).argsort(descending=True)[:2]
    w = torch.zeros_like(g)
    w[:, best] = g[:, best] / g[:, best].sum(1, keepdim=True)
    outputs = torch.stack([parts.expert0(x), parts.expert1(x), parts.expert2(x)], 1)
    outputs[:, [m for m in range(3) if m not in best]] = 0
    return w, lambda w: (w[:, :, None] * outputs).sum(1)


@pytest.mark.parametrize(
    ("method", "plain", "changes"),
    [
        (
            "pfedmoe",
            pfedmoe,
            {"model__pool": "mlp5", "gate__start": "paper", "pfedmoe__mixture": "mean"},
        ),
        ("fedjets", fedjets, {"fedjets__experts": 3, "fedjets__common_epochs": 1, "train__lr_gate": 1.0}),
    ],
)
def test_measured_numbers_are_those_of_the_gates(
    data: Path, method: str, plain: Any, changes: dict[str, Any]
) -> None:
    loop, gate = measured(data, method, **changes)
    federation = loop.federation
    assert federation.gate_rows is not None and len(federation.gate_rows) == min(
        ROWS, sum(map(len, federation.partition.test))
    )
    rows = federation.engine.normalise(federation.gate_rows.x)
    found = []
    for client in federation.clients.values():
        parts = federation.parts(client, loop.state)
        for module in parts.modules().values():
            module.eval()
        split = client.splits["test"]
        with torch.no_grad():
            w, answer = plain(parts, federation.engine.normalise(split.x))
            of_rows = plain(parts, rows)[0] if method == "pfedmoe" else fedjets_rows(parts, rows, w)
            found.append((w.double(), split.y, of_rows.double(), accuracies(w, answer, split.y)))
    w, y = torch.cat([each[0] for each in found]), torch.cat([each[1] for each in found])
    n, experts = w.shape
    client = torch.repeat_interleave(torch.arange(len(found)), torch.tensor([len(each[0]) for each in found]))
    of_client = torch.stack([w[client == k].mean(0) for k in client.tolist()])
    of_class = torch.stack(
        [w[(client == k) & (y == c)].mean(0) for k, c in zip(client.tolist(), y.tolist(), strict=True)]
    )
    spread = {"within": w - of_class, "classes": of_class - of_client, "clients": of_client - w.mean(0)}
    for name, difference in spread.items():
        expected = difference.square().mean(0).sqrt()
        assert gate["spread"][name] == pytest.approx(expected.tolist(), abs=1e-5), name
    total = sum(np.square(gate["spread"][name]) for name in spread)
    assert total == pytest.approx(w.var(0, correction=0).numpy(), abs=1e-5), "the three add up"
    assert gate["load"] == pytest.approx(w.mean(0).tolist(), abs=1e-6)
    counts = torch.bincount(w.argmax(1), minlength=experts) / n
    assert gate["first"] == pytest.approx(counts.tolist())
    entropy = torch.special.entr(w).sum(1).mean() / np.log(experts)
    assert gate["entropy"] == pytest.approx(float(entropy), abs=1e-6)
    of_rows = torch.stack([each[2] for each in found])
    assert gate["disagreement"] == pytest.approx(of_rows.std(0, correction=0).mean(0).tolist(), abs=1e-5)
    constant, *without = np.mean([each[3] for each in found], axis=0)
    assert gate["accuracy"]["constant"] == pytest.approx(constant)
    assert gate["accuracy"]["without"] == pytest.approx(without)
    assert len({constant, *without}) > 1


def fedjets_rows(parts: Any, x: Tensor, own: Tensor) -> Tensor:
    """Return weights of the experts that were chosen over a client's own samples."""
    chosen = own.sum(0) > 0
    w = parts.gate(parts.common.extractor(x)) * chosen
    return w / w.sum(1, keepdim=True)


def accuracies(w: Tensor, answer: Any, y: Tensor) -> list[float]:
    """Return the accuracy with the mean weights, and with each expert's weight given to the others."""
    changed = [w.mean(0).expand(w.shape)]
    for m in range(w.shape[1]):
        others = w.clone()
        others[:, m] = 0
        changed.append(others / others.sum(1, keepdim=True).clamp_min(1e-30))
    return [float((answer(each).argmax(1) == y).double().mean()) for each in changed]


def test_published_gates_differ_before_they_learn_and_even_ones_do_not(data: Path) -> None:
    """Nothing is learned at rate 0, except running statistics; a published gate is a random router."""
    still = {"train__lr": 0.0, "train__lr_shared": 0.0, "train__lr_gate": 0.0, "model__pool": "mlp5"}
    still["train__epochs"] = 20
    _, published = measured(data, "pfedmoe", gate__start="paper", **still)
    _, even = measured(data, "pfedmoe", **still)
    spread = np.hypot(published["spread"]["within"][0], published["spread"]["classes"][0])
    assert spread > 0.15 and published["disagreement"][0] > 0.1
    assert even["load"] == even["first"] == [0.5, 0.5] and even["entropy"] == pytest.approx(1)
    assert even["disagreement"] == [0, 0] and set(map(tuple, even["spread"].values())) == {(0, 0)}


def test_one_expert_is_replaced_where_top1_used_no_other(data: Path) -> None:
    """Without an expert that a sample used alone, the others answer, as their mean weights say."""
    _, gate = measured(data, "pfedmoe", gate__routing="top1", model__pool="mlp5", pfedmoe__extractors=2)
    assert gate["entropy"] == 0 and gate["load"] == pytest.approx(gate["first"])
    assert all(0 < accuracy <= 1 for accuracy in gate["accuracy"]["without"])


def test_an_expert_that_is_never_used_replaces_one_that_always_is() -> None:
    """A gate that has collapsed: this is what the number is for."""
    own = np.array([[0.0, 1.0], [0.0, 1.0]])
    replaced = without_expert(own, own.mean(0), np.array([True, False]))
    assert replaced.tolist() == [[1, 0], [1, 0]]
    three = np.array([[1.0, 0.0, 0.0]])
    assert without_expert(three, three[0], np.array([False, True, True])).tolist() == [[0, 0.5, 0.5]]


def test_clients_that_evaluate_one_expert_have_no_accuracy_without_it(data: Path) -> None:
    """FedJETs with K = 1: without another expert's weight nothing changes for them."""
    options = {"fedjets__experts": 3, "fedjets__top": 1, "fedjets__common_epochs": 1}
    loop, gate = measured(data, "fedjets", **options)
    chosen = [m for m in range(3) if gate["load"][m] > 0]
    by_client = np.array(loop.history[-1]["clients"]["accuracy"])
    if len(chosen) == 1:
        assert gate["accuracy"]["without"][chosen[0]] is None
    for m in {0, 1, 2} - set(chosen):
        assert gate["accuracy"]["without"][m] == pytest.approx(by_client.mean())
    assert set(chosen) != {0, 1, 2}, "three clients, so that no case is without a check"


def test_sums_hold_ten_million_samples() -> None:
    total = GateSum(2, 2)
    total.add("load", [9e6, 1.5])
    total.add("load", [9e6, 1.5])
    assert total.real("load").tolist() == [18e6, 3.0]


def test_methods_without_a_gate_have_no_numbers(data: Path) -> None:
    _, gate = measured(data, "standalone", model__pool="mlp5")
    values = [
        value for each in gate.values() for value in (each.values() if isinstance(each, dict) else [each])
    ]
    assert set(values) == {None} and len(values) == 9
