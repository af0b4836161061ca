"""Rows that only the server has, and what happens before round 1."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfedmoe_mpi import algorithms
from pfedmoe_mpi.algorithms.base import Algorithm, Inputs
from pfedmoe_mpi.core.parts import Parts, Spec
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.data.partition import Partition
from pfedmoe_mpi.data.set_apart import reserve_rows
from pfedmoe_mpi.errors import ConfigError, PartitionError, StoppedError
from pfedmoe_mpi.federation import federation
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.mpi import launch
from support import launcher
from support.launcher import checkpoint_digest, run_to_end
from support.unseen_clients import FLAGS, build_federation

# Rows of the server's own


@pytest.mark.parametrize(
    "changes", [{}, {"partition.kind": "dirichlet", "unseen.clients": 0}, {"partition.validation": 0.2}]
)
def test_reserved_training_and_unseen_rows_are_disjoint(changes: dict[str, Any]) -> None:
    federation = build_federation(algorithm="fedjets", **changes)
    partition = federation.partition
    kinds = {
        "reserved": set(partition.reserved.tolist()),
        "unseen": {
            r
            for k in partition.unseen
            for part in (partition.train, partition.validation, partition.test)
            for r in part[k].tolist()
        },
        "training": {
            r
            for k in federation.task.training
            for part in (partition.train, partition.validation, partition.test)
            for r in part[k].tolist()
        },
    }
    assert sum(map(len, kinds.values())) == len(set().union(*kinds.values()))
    assert len(kinds["reserved"]) == 80 and len(kinds["training"]) > 100
    assert federation.reserved and not federation.reserved.spec
    own = {name: len(split) for name, split in federation.reserved.splits.items()}
    assert own == {"train": 64, "test": 16}
    held = federation.dataset.labels[partition.reserved]
    assert (np.bincount(held, minlength=6) > 0).all()


def test_row_in_two_places_raises() -> None:
    good = Partition((np.array([0, 1]),), (np.array([2]),), (np.array([3]),), reserved=np.array([4, 5]))
    good.check()
    for bad in (3, 1, 2):
        with pytest.raises(AssertionError, match="a row occurs twice"):
            Partition(good.train, good.validation, good.test, reserved=np.array([4, bad])).check()


def test_reserving_is_repeatable_and_bounded() -> None:
    def deal(rows: np.ndarray) -> Partition:
        return Partition((np.arange(len(rows)),), (np.empty(0, np.int64),), (np.empty(0, np.int64),))

    first, again, other = (reserve_rows(100, 0.3, seed, deal) for seed in (0, 0, 1))
    assert np.array_equal(first.reserved, again.reserved) and len(first.reserved) == 30
    assert not np.array_equal(first.reserved, other.reserved)
    assert sorted([*first.reserved, *first.train[0]]) == list(range(100))
    assert len(reserve_rows(100, 0.0, 0, deal).reserved) == 0
    with pytest.raises(PartitionError, match="reserves 5 rows for the server"):
        reserve_rows(100, 0.05, 0, deal)


def test_methods_without_pretraining_reserve_nothing() -> None:
    federation = build_federation(algorithm="fedavg")
    assert not len(federation.partition.reserved) and federation.reserved is None


# Before round 1


def test_wrong_weights_file_is_refused_before_writing(assert_refused: Callable[..., str]) -> None:
    message = assert_refused(
        "there is no file", *FLAGS, "--algorithm", "fedjets", "--fedjets.common", "none.h5"
    )
    assert "check the path" in message


def test_divergence_before_round_1_is_reported() -> None:
    federation = build_federation(
        algorithm="fedjets", train__lr_shared=1e30, train__clip=0.0, fedjets__common_target=1.0
    )
    with pytest.raises(ConfigError, match="training before round 1 diverged"):
        Loop(launch.start(), federation, SilentObserver(), None).run()


def test_pretraining_accuracy_is_reported(tmp_path: Path, session: launcher.Session) -> None:
    flags = ("--algorithm", "fedjets", "--fedjets.common_target", "1", "--fedjets.common_epochs", "1")
    said = session(*FLAGS, *flags, "--run.dir", "run", cwd=tmp_path)
    assert "common expert: accuracy " in said.out and "below fedjets.common_target = 1" in said.out
    (line,) = [
        event["result"] for event in launcher.read_events(tmp_path / "run") if event["event"] == "pretrained"
    ]
    assert line in said.out


class Two(Algorithm):
    """Prepares the sum of a client's samples; its pretraining fills the state with 7."""

    prepared_size = 2

    def state(self) -> Spec:
        return {"model": self.task.model(self.task.pool[0])}

    def predict(self, parts: Parts, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = parts.model(x)
        return logits

    def pretrain(self, turn: Turn) -> str:
        for _ in turn.batches("test"):
            turn.parts.vector("model").fill_(7.0)
        return "filled"

    def prepare(self, parts: Parts, inputs: Inputs) -> torch.Tensor:
        total = sum(float(x.double().sum()) for x in inputs())
        return torch.tensor([total, float(parts.vector("model").mean())])


def with_two(monkeypatch: pytest.MonkeyPatch) -> federation.Federation:
    monkeypatch.setattr(Two, "reserve", classmethod(lambda cls, config: 0.2))
    monkeypatch.setattr(algorithms, "load", lambda name: Two)
    return build_federation(algorithm="fedavg")


def test_prepare_sees_the_pretrained_state(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = with_two(monkeypatch)
    loop = Loop(launch.start(), federation, SilentObserver(), None)
    assert loop.begin() and (loop.state == 7).all()
    for k, client in federation.clients.items():
        x = federation.engine.normalise(client.splits["train"].x)
        assert float(federation.method.prepared[k, 0]) == pytest.approx(float(x.double().sum()), rel=1e-5)
        assert float(federation.method.prepared[k, 1]) == 7


@pytest.mark.parametrize("after", [0, 1, 5])
def test_stop_before_round_1_saves_only_finished_pretraining(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: int
) -> None:
    """A stop during pretraining leaves nothing; after it, a checkpoint of round 0."""
    left = [after]

    def poll() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise StoppedError

    world = launch.start()
    monkeypatch.setattr(world, "poll", poll)
    monkeypatch.setattr(launch, "start", lambda: world)
    federation = with_two(monkeypatch)
    loop = Loop(world, federation, SilentObserver(), tmp_path)
    start = loop.state.clone()
    assert not loop.run() and not loop.history
    if after == 0:
        assert not list(tmp_path.iterdir()) and torch.equal(loop.state, start)
    else:
        assert [path.name for path in tmp_path.iterdir()] == ["round-000000.h5"] and (loop.state == 7).all()


@pytest.mark.parametrize("anchors", ["labels", "clusters"])
def test_signal_during_pretraining_stops_with_75(
    tmp_path: Path, session: launcher.Session, anchors: str
) -> None:
    """The exit code is 75; the restart on other ranks repeats the pretraining, to the same bits."""
    slow = ("--fedjets.common_target", "1", "--fedjets.common_epochs", "200", "--fedjets.common_rate", "1e-9")
    flags = (*FLAGS, "--algorithm", "fedjets", "--fedjets.anchors", anchors, *slow)
    assert session(*flags, "--run.dir", "whole", cwd=tmp_path).code == 0
    with launcher.running_job(2, *flags, "--run.dir", "run", cwd=tmp_path) as job:
        launcher.wait_for_file(tmp_path / "run" / "events.jsonl", job)
        ranks = launcher.rank_processes(job.pid)
        os.kill(ranks[1], signal.SIGUSR1)
        ended = launcher.wait_for_end(job, 60)
    assert ended.code == 75 and "stopped by SIGUSR1 to rank 1 before round 1" in ended.out, (
        ended.out + ended.err
    )
    run_to_end(3, "restart", "run", cwd=tmp_path)
    assert checkpoint_digest(tmp_path / "run", 2) == checkpoint_digest(tmp_path / "whole", 2)


def test_pretraining_rank_is_not_timed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time-out applies to rounds; before the first one it is infinite, or the user's setting."""
    world, seen = launch.start(), []
    monkeypatch.setattr(launch, "start", lambda: world)
    agree = world.agree
    monkeypatch.setattr(world, "agree", lambda *given: seen.append(world.timeout) or agree(*given))
    for changes, expected in (({}, float("inf")), ({"run__timeout": 77.0}, 77.0)):
        federation = build_federation(algorithm="fedjets", fedjets__common_target=0.0, **changes)
        loop = Loop(world, federation, SilentObserver(), None)
        before = world.timeout
        seen.clear()
        assert loop.begin() and seen == [expected] and world.timeout == before
