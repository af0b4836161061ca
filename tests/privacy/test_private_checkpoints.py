"""Checkpoints of runs with masks and differential privacy: restarted, measured, packed, verified."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.errors import ConfigError, RunError
from pfedmoe_mpi.federation.build import build
from pfedmoe_mpi.federation.privacy_account import account_of
from pfedmoe_mpi.mpi import launch
from pfedmoe_mpi.privacy import accountant
from pfedmoe_mpi.privacy.masked_sum import Member
from pfedmoe_mpi.run.evaluate import evaluation_loop
from pfedmoe_mpi.run.identity import run_identity
from support.launcher import Session, checkpoint_digest, error_message, read_metrics
from support.masked_job import digest, make_loop

PRIVATE: dict[str, dict[str, Any]] = {
    "client": {"privacy__clip": 1.0, "privacy__noise": 0.5, "privacy__masked": True},
    "sample": {
        "algorithm": "fedavg",
        "privacy__unit": "sample",
        "privacy__clip": 1.0,
        "privacy__epsilon": 8.0,
        "privacy__masked": True,
    },
}
GATE = {"gate__input_norm": "layer", "gate__batch_norm": False, "participation": 0.7, "rounds": 3}


@pytest.mark.parametrize("unit", PRIVATE)
def test_a_partial_checkpoint_serves_every_command(
    tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    """The restart has the digest and the ε of the undisturbed run, a fork none, and no file has a key."""
    settings = {**GATE, **PRIVATE[unit], "run__checkpoint_every": 1}
    for name in ("whole", "stopped"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    undisturbed = make_loop(launch.start().split(0), tmp_path / "whole" / "checkpoints", **settings)
    assert undisturbed.run()
    stopped = make_loop(launch.start().split(0), tmp_path / "stopped" / "checkpoints", **settings)
    stopped.saver.identity = run_identity(stopped.federation)

    def stop(round: int, done: int, members: int) -> None:
        stopped.comm.signal_received = signal.SIGUSR1 if (round, done) == (2, 2) else 0

    stopped._observer.client_trained = stop  # type: ignore[method-assign]
    assert not stopped.run()
    partial = tmp_path / "stopped" / "checkpoints" / "round-000002-partial.h5"

    def done(*arguments: str) -> str:
        result = session(*arguments, cwd=tmp_path)
        assert result.code == 0, result.err
        return result.out

    done("pack", str(partial), "packed.h5")
    done("restart", "packed.h5", "--run.dir", "again")
    assert checkpoint_digest(tmp_path / "again", 3) == checkpoint_digest(tmp_path / "whole", 3)
    rows = read_metrics(tmp_path / "again")
    assert [row["privacy"] for row in rows] == [row["privacy"] for row in undisturbed.history]
    epsilon, card = f"ε = {rows[-1]['privacy']['epsilon']:.3g} of ", done("verify", "again", "--rounds", "1")
    assert card.count("the same bits") == card.count(f"after round 3 {epsilon}") == 1
    assert f"after round 3 {epsilon}" in done("inspect", "again/checkpoints/round-000003.h5")
    assert done("inspect", "packed.h5", "--digest") == done("inspect", str(partial), "--digest")
    done("export", "packed.h5", "--client", "1", "model.h5")
    fork = ("fork", "again", "--at", "2", "--train.lr", "0.2", "--run.dir", "fork")
    message = error_message(session(*fork, cwd=tmp_path), "a fork adds the noise of its run once more")
    done(*fork, *re.findall(r"--privacy\.\w+ 0", message)[0].split())
    of_fork = [row["privacy"]["epsilon"] for row in read_metrics(tmp_path / "fork")]
    assert of_fork == [rows[0]["privacy"]["epsilon"], rows[1]["privacy"]["epsilon"], None]
    monkeypatch.setattr(accountant, "solve", lambda *arguments: 99.0)  # as another version might
    with Checkpoint(tmp_path / "packed.h5") as loaded:
        resumed = build(launch.start(), stopped.federation.config, loaded=loaded, warn=False)
    account = account_of(resumed)
    assert account and account.entry(1) == rows[0]["privacy"], "the noise is that of the rounds before"
    check_no_keys(tmp_path)
    check_measured_without_packages(tmp_path / "packed.h5", stopped.federation.config, monkeypatch)


def check_no_keys(folder: Path) -> None:
    """Check that no secret of a member in any round is in a file."""
    raw = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    members = [Member(0, round, client, {client: []}) for round in (1, 2, 3) for client in range(6)]
    secrets = [value for member in members for value in vars(member).values() if isinstance(value, bytes)]
    assert len(secrets) == 72
    assert not any(secret in raw or secret.hex().encode() in raw for secret in secrets)


def check_measured_without_packages(path: Path, settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a measurement needs no package of the extra `privacy`, which training needs."""
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    monkeypatch.setattr("pfedmoe_mpi.privacy.agreement.find_spec", lambda name: None)
    checkpoint.verify(path)
    with Checkpoint(path) as loaded:
        loop = evaluation_loop(launch.start(), loaded, {}, protected=False)
        assert loop.evaluation()["accuracy"]["mean"] is not None
        with pytest.raises(ConfigError, match="which is not installed"):
            build(launch.start(), settings, loaded=loaded, warn=False)


@pytest.mark.parametrize("unit", PRIVATE)
def test_a_client_that_diverges_can_stop_a_private_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    """The stop keeps the others' contributions without noise, and the restart adds it once."""
    step = Algorithm.client_step

    def spoilt(self: Algorithm, turn: Turn) -> Any:
        values = step(self, turn)
        return {name: value * float("nan") for name, value in values.items()} if turn.client == 1 else values

    monkeypatch.setattr(Algorithm, "client_step", spoilt)
    settings = {**PRIVATE[unit], "algorithm": "fedavg", "rounds": 1}
    dropped = make_loop(launch.start(), **settings)
    assert dropped.run() and dropped.history[0]["dropped"] == [1]
    stopped = make_loop(launch.start(), tmp_path, **settings, faults__nonfinite="stop")
    with pytest.raises(RunError, match="vector of client 1 is not finite"):
        stopped.run()
    again = make_loop(launch.start(), **settings)
    with Checkpoint(tmp_path / "round-000001-partial.h5") as loaded:
        assert loaded.finished == [0, 2, 3, 4, 5]
        again.resume(loaded)
    assert again.run() and digest(again) == digest(dropped)
    assert again.history[0]["privacy"] == dropped.history[0]["privacy"]
