"""Few-shot tuning of clients that never train, and clients that are drawn whatever their labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oracles.personal import posterior
from pfedmoe_mpi.core.batches import Split
from pfedmoe_mpi.core.fixedpoint import NotFiniteError
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.federation import tuning
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.federation.metrics import learning
from pfedmoe_mpi.mpi import launch
from support.small_federation import build_loop, write_data
from support.unseen_clients import build_federation


def trained(**changes: Any) -> Loop:
    loop = Loop(launch.start(), build_federation(**changes), SilentObserver(), None)
    assert loop.run()
    return loop


def a_new_client(federation: Federation) -> Any:
    return federation.clients[min(federation.task.unseen)]


@pytest.mark.parametrize("method", ["pfedmoe", "fedavg", "scaffold"])
def test_tuning_changes_nothing_but_what_it_reports(method: str) -> None:
    without, with_tuning = (trained(algorithm=method, unseen__tune=tune) for tune in (0, 3))
    assert torch.equal(without.state, with_tuning.state)
    clients = with_tuning.federation.clients
    assert all(torch.equal(c.vector, clients[k].vector) for k, c in without.federation.clients.items())
    for before, row in zip(without.history, with_tuning.history, strict=True):
        assert before["accuracy_tuned"]["mean"] is None and row["accuracy_tuned"]["mean"] is not None
        measured = {k for k, value in enumerate(row["clients"]["accuracy_tuned"]) if value is not None}
        assert measured == with_tuning.federation.task.unseen
        others = [{k: v for k, v in learning(r).items() if k != "accuracy_tuned"} for r in (before, row)]
        for other in others:
            other["clients"] = {k: v for k, v in other["clients"].items() if k != "accuracy_tuned"}
        assert others[0] == others[1]
    assert with_tuning.evaluation()["accuracy_tuned"] == with_tuning.history[-1]["accuracy_tuned"]


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("pfedmoe", {"model": 0.3, "gate": 0.5}),
        ("fedavg", {"model": 0.4}),
        ("fedrep", {"head": 0.3}),
        ("fml", {"model": 0.3}),
        ("fedmix", {"expert0": 0.4, "expert1": 0.4, "gate": 0.5}),
        ("ensemble", {f"model{q}": 0.4 for q in range(5)}),
        ("pfedafm", {"model": 0.3, "weights": 0.5}),
    ],
)
def test_private_modules_are_tuned_or_all_without_any(method: str, parts: dict[str, float]) -> None:
    rates = {"train__lr": 0.3, "train__lr_shared": 0.4, "train__lr_gate": 0.5}
    made = build_federation(algorithm=method, unseen__tune=7, train__steps=2, **rates)
    phase = tuning.phase(made, a_new_client(made))
    assert phase.lr == parts and (phase.epochs, phase.steps) == (7, 0)


def test_fedjets_is_tuned_as_it_trains() -> None:
    """The common expert stays, and so does a frozen gate; the gate's SGD is plain."""
    experts = dict.fromkeys((f"expert{m}" for m in range(4)), 0.4)
    rates = {"train__lr": 0.3, "train__lr_shared": 0.4, "train__lr_gate": 0.5}
    for frozen in (False, True):
        options = {"fedjets__gate_frozen": frozen, "fedjets__common_target": 0.0}
        made = build_federation(algorithm="fedjets", unseen__tune=2, **options, **rates)
        phase = tuning.phase(made, a_new_client(made))
        assert phase.lr == experts | ({} if frozen else {"gate": 0.5})
        assert phase.plain == (set() if frozen else {"gate"})


def test_a_private_module_that_no_phase_trains_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """FML's own model, if its training were its client step's alone."""
    made = build_federation(algorithm="fml", unseen__tune=2)
    monkeypatch.setattr(type(made.method), "phases", lambda self, role: [self.phase({"shared": 0.1})])
    client = a_new_client(made)
    parts = made.parts(client, made.workbench.initial(made.method.state()))
    before = parts.vector("model").clone()
    assert tuning.tune(made, client, parts) and torch.equal(parts.vector("model"), before)


def test_tuned_mixing_weights_of_pfedafm_stay_between_0_and_1() -> None:
    made = build_federation(algorithm="pfedafm", unseen__tune=5, train__lr_gate=0.5)
    client = a_new_client(made)
    parts = made.parts(client, made.workbench.initial(made.method.state()))
    assert tuning.tune(made, client, parts)
    alpha = parts.vector("weights")
    assert not torch.equal(alpha, torch.ones_like(alpha))
    assert float(alpha.min()) >= 0 and float(alpha.max()) <= 1


def test_tuning_is_that_many_epochs_on_the_shots() -> None:
    """The result is that of plain SGD on the same samples, at the rate before any schedule."""
    made = build_federation(algorithm="standalone", unseen__tune=2, unseen__shots=3, train__schedule="cosine")
    client = a_new_client(made)
    state = torch.empty(0)
    parts = made.parts(client, state)
    assert tuning.tune(made, client, parts)
    found = parts.vector("model").clone()
    split = tuning.shots(client.splits["train"], 3, made.config.seed, client.id)
    assert not torch.equal(found, client.vector)
    client.splits["train"] = split
    parts = made.parts(client, state)
    turn = Turn(made.engine, made.method.loss, client, parts, 0, "client")
    assert turn.rate == 1
    turn.sgd(made.method.phase({"model": made.config.train.lr}, epochs=2))
    assert torch.equal(found, parts.vector("model"))


def test_a_new_client_of_fedem_finds_its_weights_and_keeps_the_components() -> None:
    made = build_federation(algorithm="fedem", unseen__tune=4, unseen__shots=5)
    client, components = a_new_client(made), [f"component{m}" for m in range(3)]
    state = made.workbench.initial(made.method.state())
    parts = made.parts(client, state)
    before = [parts.vector(name).clone() for name in components]
    assert torch.allclose(parts.weights, torch.full((3,), 1 / 3))
    predict = made.method.predictor(parts, lambda: iter([]), unseen=True)
    split = tuning.shots(client.splits["train"], 5, made.config.seed, client.id)
    x = made.engine.normalise(split.x)
    modules = [getattr(parts, name) for name in components]
    p = torch.stack([module(x).softmax(1) for module in modules]).mean(0)
    assert predict and torch.allclose(predict(x).exp(), p, atol=1e-6)
    assert tuning.tune(made, client, parts)
    assert all(torch.equal(parts.vector(name), v) for name, v in zip(components, before, strict=True))
    expected = torch.full((3,), 1 / 3)
    for _ in range(4):
        expected = posterior(modules, expected, x, split.y).mean(0).float()
    assert torch.allclose(parts.weights, expected, atol=1e-6) and expected.std() > 1e-3


def test_shots_are_samples_of_every_class() -> None:
    y = torch.tensor([0, 1, 0, 1, 0, 2, 0, 0])
    split = Split(torch.arange(8.0)[:, None], y)
    few = tuning.shots(split, 2, seed=0, client=3)
    assert torch.bincount(few.y).tolist() == [2, 2, 1] and few.x[few.y == 2].item() == 5
    assert torch.equal(few.x, tuning.shots(split, 2, seed=0, client=3).x)
    more = tuning.shots(split, 3, seed=0, client=3)
    assert set(few.x.ravel().tolist()) < set(more.x.ravel().tolist()), "more shots contain fewer"
    assert len({tuple(tuning.shots(split, 2, 0, k).x.ravel().tolist()) for k in range(20)}) > 5
    alone = tuning.shots(Split(split.x[:3], torch.zeros(3, dtype=torch.int64)), 1, 0, 0)
    assert len(alone) == 2, "batch normalisation needs two"
    assert tuning.shots(replace(split, streamed=True), 2, 0, 3).streamed, "samples in host memory stay there"


def test_tuning_that_diverges_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    made = build_federation(algorithm="fedavg", unseen__tune=1)
    client = a_new_client(made)

    def diverge(*_: Any) -> None:
        raise NotFiniteError

    monkeypatch.setattr(Turn, "sgd", diverge)
    loop = Loop(launch.start(), made, SilentObserver(), None)
    row = loop.evaluation()
    assert row["accuracy_tuned"]["mean"] is None and row["clients"]["accuracy"][client.id] is not None


def test_new_clients_of_natural_partitions_are_drawn_from_all(tmp_path: Path) -> None:
    """The three clients' labels overlap in pairs; equal label sets would stay together."""
    path = write_data(tmp_path / "d.h5", 8)
    chosen = {
        client
        for seed in range(8)
        for client in build_loop(
            path, "fedavg", unseen__clients=1, unseen__by="client", seed=seed, model__pool="mlp5"
        ).federation.task.unseen
    }
    assert chosen == {0, 1, 2}
    equal = build_federation(partition__kind="iid", clients=6, unseen__clients=2, unseen__by="client")
    assert len(equal.task.unseen) == 2 and len(np.unique(equal.task.counts[:, 0] > 0)) == 1
