"""DP-SGD in a federation: every method's gradients per sample, refusals, ranks and restarts."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pfedmoe_mpi import config
from pfedmoe_mpi.config import methods
from pfedmoe_mpi.conformance.checks import Case
from pfedmoe_mpi.conformance.traffic import traffic_errors
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.fixedpoint import NotFiniteError
from pfedmoe_mpi.core.sample_step import SampleStep
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation import build, sample_privacy, trial, tuning
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.mpi import launch
from support.mpi_job import run_conformance
from support.sample_privacy import SAMPLE, built
from support.small_federation import plan_of

REFUSED = {
    "fd": "mean outputs",
    "fedapen": "held-out samples",
    "fedem": "losses of all samples",
    "fedgh": "mean representations",
    "fedjets": "embeddings",
    "fedkd": "mean errors",
    "fedproto": "mean representations",
    "fedssa": "which classes",
    "fedtgp": "mean representations",
}
PROTECTED = sorted(set(methods.names()) - set(REFUSED))


# Gradients of single samples


@pytest.mark.parametrize("algorithm", PROTECTED)
def test_gradients_of_samples_are_those_of_a_loop(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    federation, method = built(algorithm, clients=3, participation=1.0), None
    compared = 0
    gradients = SampleStep.gradients

    def with_loop(step: SampleStep, batch: Batch) -> tuple[Mapping[str, Any], Tensor]:
        nonlocal compared
        found, losses = gradients(step, batch)
        for i in range(len(batch)):
            value = step._loss(Batch(batch.x[i : i + 1], batch.y[i : i + 1], batch.rows[i : i + 1]))
            torch.testing.assert_close(losses[i], value.detach(), rtol=1e-5, atol=1e-6)
            for name, of_part in found.items():
                parameters = step._parts.parameters(name)
                for p, each in zip(
                    torch.autograd.grad(value, parameters, retain_graph=True), of_part, strict=True
                ):
                    torch.testing.assert_close(each[i], p, rtol=1e-5, atol=1e-5)
                compared += len(parameters)
        return found, losses

    monkeypatch.setattr(SampleStep, "gradients", with_loop)
    method = federation.method
    for client, role in trial.members(federation):
        few = {name: split.rows(slice(0, 5)) for name, split in client.splits.items()}
        parts = federation.parts(client, federation.workbench.initial(method.state()))
        engine = replace(federation.engine, train=federation.engine.train.model_copy(update={"batch": 3}))
        method.client_step(Turn(engine, method.loss, replace(client, splits=few), parts, 1, role))
        parts.check()
    assert compared


def test_a_trial_that_diverges_says_nothing_of_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ditto's first phase diverges, so that the second is not trained."""
    federation = built("ditto", privacy__noise=1.0)

    def diverge(*_: Any, **__: Any) -> None:
        raise NotFiniteError

    monkeypatch.setattr(Turn, "sgd", diverge)
    sample_privacy.check(launch.start(), federation)


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("algorithm", ["ditto", "apfl"])
def test_what_is_apart_does_not_reach_what_is_sent(algorithm: str, clip: float) -> None:
    federation = built(algorithm, privacy__noise=1.0, train__clip=clip)
    client, state = federation.clients[0], federation.workbench.initial(federation.method.state())
    sent = []
    for factor in (1.0, 3.0):
        vector = client.vector * factor
        parts = federation.parts(replace(client, vector=vector), state)
        turn = Turn(federation.engine, federation.method.loss, client, parts, 1, "client")
        sent.append(federation.method.client_step(turn)["model"].clone())
        left = federation.workbench.read(client.spec, parts, torch.empty_like(vector))
        assert not torch.equal(left, vector), "the private part was trained, too"
    assert torch.equal(*sent)


def test_texts_are_trained_too(tmp_path: Path) -> None:
    table = "\n".join(
        ["text,label", *(f"{'good' if i % 2 else 'bad'} word{i % 7},{i % 2}" for i in range(80))]
    )
    (tmp_path / "texts.csv").write_text(table)
    source = {"data.source": "table", "data.path": str(tmp_path / "texts.csv"), "data.text": "text"}
    settings = {**SAMPLE, **source, "data.label": "label", "partition.kind": "iid", "clients": 2, "rounds": 1}
    settings["privacy.noise"] = 1.0
    for pool in ("fasttext", "transformer", "lstm"):
        chosen = config.build({**settings, "algorithm": "fedavg", "model.pool": pool, "model.shared": pool})
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            federation = build.build(launch.start(), chosen, warn=False)
        assert federation.engine.samples, "the trial compared the gradients"
    assert any("the vocabulary comes from the training texts" in line for line in plan_of(federation))


# Refusals


@pytest.mark.parametrize(("algorithm", "reason"), REFUSED.items())
def test_methods_that_use_samples_otherwise_are_refused(algorithm: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"does not protect {algorithm}: .*{reason}") as error:
        built(algorithm)
    assert "--privacy.unit client" in error.value.remedy


OWN = '''"""Mine: {name}. 2026."""
from pfedmoe_mpi.algorithms.fedavg import FedAvg
import torch

class Mine(FedAvg):
{body}
'''
BODIES = {
    "its loss is not a mean over samples": """
    def loss(self, parts, batch):
        return super().loss(parts, batch) * 2 + parts.model(batch.x).mean(0).square().sum()
""",
    r"reads samples without noise \(Turn.labels\)": """
    def client_step(self, turn):
        turn.labels
        return super().client_step(turn)
""",
    r"reads samples without noise \(Turn.batches\)": """
    def client_step(self, turn):
        if turn.round > 1:
            list(turn.training_batches())
        return super().client_step(turn)
""",
    r"reads samples without noise \(Turn.loss\)": """
    def client_step(self, turn):
        values = super().client_step(turn)
        return values if turn.loss < 3 else {}
""",
    "trains something besides the parts": """
    def client_step(self, turn):
        scale = torch.ones(1, requires_grad=True)
        turn.sgd(self.phases("client")[0], lambda batch: self.loss(turn.parts, batch) * scale.sum())
        return {"model": turn.parts.vector("model")}
""",
    "its client step trains others": """
    def client_step(self, turn):
        turn.sgd(self.phase({"model": 0.1}, epochs=3))
        return {"model": turn.parts.vector("model")}
""",
    "has no gradient for each sample alone": """
    def loss(self, parts, batch):
        if bool(batch.y.sum() > 0):
            return super().loss(parts, batch)
        return super().loss(parts, batch)
""",
    "clients tell which classes they hold": """
    def payload(self, sizes):
        from pfedmoe_mpi.algorithms.base import Block
        return {"seen": Block(1, rows=self.task.classes, weight="class_one")}

    def server_update(self, state, means, round):
        pass
""",
}


@pytest.mark.parametrize("problem", BODIES)
def test_methods_of_ones_own_are_tried(tmp_path: Path, problem: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN.format(name=problem.replace("\\", ""), body=BODIES[problem]))
    with pytest.raises(ConfigError, match=problem):
        built(str(path))


@pytest.mark.parametrize(
    ("changes", "problem", "remedy"),
    [
        ({"gate__batch_norm": True}, "BatchNorm1d in gate mixes", "--gate.batch_norm false"),
        ({"gate__input_norm": "switch"}, "SwitchNorm in gate mixes", "--gate.input_norm layer"),
        (
            {"model__pool": "shufflenet_v2_x0_5", "model__shared": "shufflenet_v2_x0_5"},
            "BatchNorm2d in shared mixes",
            "--model.train head",
        ),
        ({"privacy__clip": 0.0}, "no effect with privacy.clip = 0", "--privacy.clip 1"),
        (
            {"privacy__clip": 4.0, "privacy__noise": 1e30},
            "privacy.noise = 1e+30 is too large: with privacy.clip = 4, sums hold at most 1.04e+06",
            "--privacy.noise 1.04e+06",
        ),
        (
            {"privacy__noise": 1.0, "privacy__epsilon": 2.0},
            "privacy.epsilon = 2 chooses it",
            "--privacy.noise",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: Mapping[str, Any], problem: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)) as error:
        built("pfedmoe", **changes)
    assert remedy in error.value.remedy


DROPOUT = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, shape, dim):
        super().__init__(nn.Flatten(), nn.Dropout(0.5), nn.Linear(shape[0] * shape[1] * shape[2], dim))
"""


def test_dropout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(DROPOUT)
    model = f"{tmp_path / 'nets.py'}:Net"
    with pytest.raises(ConfigError, match=r"no gradient for each sample alone: .*random") as error:
        built("fedavg", model__pool=model, model__shared=model)
    assert "without dropout" in error.value.remedy


def test_frozen_batch_normalisation_is_no_obstacle() -> None:
    names = {"model__pool": "shufflenet_v2_x0_5", "model__shared": "shufflenet_v2_x0_5"}
    federation = built("fedavg", model__train="head", data__size=32, clients=2, data__samples=40, **names)
    assert federation.engine.samples


def test_a_missing_accountant_is_refused_before_round_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match="dp-accounting") as error:
        built("fedavg")
    assert "pfedmoe_mpi[privacy]" in error.value.remedy


def test_an_adaptive_mixing_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"apfl\.adaptive = true") as error:
        built("apfl", apfl__adaptive=True)
    assert error.value.remedy == "use --apfl.adaptive false"


# Where there is no noise

SERVER = '''"""Mine: a server with samples of its own. 2026."""
from pfedmoe_mpi.algorithms.fedavg import FedAvg

class Mine(FedAvg):
    @classmethod
    def reserve(cls, config):
        return 0.2

    def pretrain(self, turn):
        turn.sgd(self.phases("client")[0])
        return "done"
'''


def test_training_before_round_1_and_tuning_have_no_noise(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SERVER)
    unseen_clients = {"unseen__clients": 1, "unseen__by": "client", "unseen__tune": 2}
    found = []
    for noise in (0.0, 9.0):
        loop = Loop(launch.start(), built(str(path), privacy__noise=noise), SilentObserver(), None)
        assert loop.begin()
        federation = built("pfedmoe", privacy__noise=noise, **unseen_clients)
        (unseen,) = federation.task.unseen
        client = federation.clients[unseen]
        parts = federation.parts(client, federation.workbench.initial(federation.method.state()))
        before = parts.vector("model").clone()
        assert tuning.tune(federation, client, parts) and not torch.equal(parts.vector("model"), before)
        found.append((loop.state.clone(), parts.vector("model").clone()))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_graphs_have_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    assert built("fedavg", train__graphs="on").engine.graphs is None
    assert "no effect with privacy.unit = sample" in capsys.readouterr().err


# The wire, ranks and restarts


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_conformance_checks_the_wire(tmp_path: Path, sampling: str) -> None:
    given = {**SAMPLE, "privacy.noise": 0.5, "privacy.sampling": sampling}
    settings = Case("fedrep", given).settings(rounds=2, faults__dropout=0.2)
    assert not traffic_errors(launch.start().split(0), settings, tmp_path)


def test_noise_and_batches_repeat_on_any_ranks_and_after_any_restart() -> None:
    given = {**SAMPLE, "privacy.noise": 0.8, "privacy.sampling": "poisson", "train.momentum": 0.5}
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value).lower())]
    code, output = run_conformance("pfedmoe", "--check", "midround", *flags, timeout=200)
    assert code == 0 and output.count(": pass") == 1, output
