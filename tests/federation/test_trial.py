"""Deterministic kernels: what has none is replaced by an equal form, or refused before round 1."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pfedmoe_mpi.conformance.checks import Case, digest
from pfedmoe_mpi.core.flat import Bound
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation import build, trial
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.mpi import launch
from pfedmoe_mpi.mpi.device import Device

CPU = torch.device("cpu")
# `put_` has no deterministic kernel on a CPU either.
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, dim):
        super().__init__()
        self.last = nn.Linear(shape[0] * shape[1] * shape[2], dim)

    def forward(self, x):
        flat = x.flatten(1).clone()
        if self.training:
            flat.put_(torch.tensor([0]), torch.zeros(1))
        return self.last(flat)
"""


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("size", "side"), [((6, 6), 13), (7, 1), ((7, 7), 7), ((2, 3), 5), ((None, 4), 6)])
def test_pooling_in_its_equal_form(deterministic: None, size: object, side: int) -> None:
    torch.manual_seed(1)
    plain = nn.AdaptiveAvgPool2d(size)  # type: ignore[arg-type]
    other = Bound(nn.Sequential(nn.AdaptiveAvgPool2d(size)), CPU).module  # type: ignore[arg-type]
    x = torch.randn(2, 3, side, side + 1).contiguous(memory_format=torch.channels_last)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = plain(one), other(two)
    assert "AdaptiveAveragePool" in repr(other) and torch.allclose(found, expected, atol=1e-6)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    assert one.grad is not None and two.grad is not None and torch.allclose(one.grad, two.grad, atol=1e-6)


def test_layers_with_a_deterministic_kernel_stay(deterministic: None) -> None:
    layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((1, 1)), nn.AvgPool2d(2))
    assert "AdaptiveAveragePool" not in repr(Bound(layers, CPU).module)


def test_an_operation_without_a_deterministic_kernel_is_refused(tmp_path: Path, deterministic: None) -> None:
    (tmp_path / "nets.py").write_text(NET)
    model = f"{tmp_path / 'nets.py'}:Net"
    torch.use_deterministic_algorithms(False)
    settings = Case("fedavg", {}).settings(model__pool=model, model__shared=model, train__device="cpu")
    federation = build.build(launch.start(), settings, warn=False)
    trial.check(launch.start(), federation)  # on a CPU nothing is tried
    torch.use_deterministic_algorithms(True)
    pretended = Device(torch.device("cuda"), "a GPU", "", "GPU-a")
    with pytest.raises(ConfigError, match=r"deterministic = true, but put_ in a step of fedavg") as error:
        trial.check(launch.start(), replace(federation, device=pretended))
    assert "--train.deterministic false" in error.value.remedy


def test_an_architecture_is_tried_that_trains_for_the_first_time_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One client trains in a round; another architecture comes after the rounds that are looked through."""
    monkeypatch.setattr(trial, "ROUNDS", 1)
    pool = {"model__pool": "mlp3,mlp4,mlp5", "participation": 0.2, "train__device": "cpu"}
    federation = build.build(launch.start(), Case("standalone", {}).settings(rounds=60, **pool), warn=False)
    tried = [client.spec["model"].kind.split()[-1] for client, _ in trial.members(federation)]
    assert sorted(tried) == ["mlp3", "mlp4", "mlp5"]
    short = replace(federation, config=federation.config.model_copy(update={"rounds": 1}))
    assert len(list(trial.members(short))) == 1, "who never trains is not tried"


def test_a_stop_does_not_leave_a_trial() -> None:
    """The other ranks would wait for its end; outputs of frozen layers, too, are made under a poll."""
    settings = Case("standalone", {}).settings(model__pool="cnn5", model__train="head", data__size=16)
    comm = launch.start()
    federation = build.build(comm, settings, warn=False)
    assert federation.engine.kept and federation.engine.kept.tails
    comm.signal_received = signal.SIGUSR1
    try:
        for client, role in trial.members(federation):
            trial.try_member(federation, client, role)
    finally:
        comm.signal_received = 0


def test_a_trial_leaves_no_trace() -> None:
    found = []
    for tried in (False, True):
        settings = Case("fedjets", {}).settings(rounds=2, train__device="cpu")
        federation = build.build(launch.start(), settings, warn=False)
        members = list(trial.members(federation)) if tried else []
        for client, role in members:
            trial.try_member(federation, client, role)
        assert not tried or {role for _, role in members} == {"client", "anchor"}
        loop = Loop(launch.start(), federation, SilentObserver(), None)
        assert loop.run()
        found.append(digest(loop))
    assert found[0] == found[1]
