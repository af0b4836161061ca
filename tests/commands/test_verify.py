"""The command `verify`: which rounds it replays, what it compares, and its card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfedmoe_mpi.commands.verify import _open_kept, _plan
from pfedmoe_mpi.run.folder import RunFolder
from support.checkpoint_files import reseal, single_rank
from support.files import path_digest
from support.launcher import SMALL_RUN, Result, Session, read_events, shared_session


def test_verify_replays_every_round_that_it_can(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    """On three ranks, although the run had two; nothing is written."""
    before = path_digest(run)
    result = shared_session(3)("verify", str(run), "--rounds", "9", cwd=tmp_path)
    assert result.code == 0 and path_digest(run) == before, result.err
    lines = result.out.splitlines()
    replayed = [line for line in lines if "replayed on 3 ranks" in line]
    assert [line.split(",")[0] for line in replayed] == ["| round 1", "| round 2", "| round 3"]
    assert [line.count("metrics and all vectors") for line in replayed] == [0, 1, 1]
    digest = run_command("inspect", run / "checkpoints/round-000003.h5", "--digest").out.strip()
    assert f"| result after round 3, SHA-256 | {digest} |" in lines
    assert "run.dir" not in result.out and "data.samples = 200" in result.out
    assert all(line.startswith("| ") or line == "|---|---|" for line in lines)


def test_verify_finds_what_differs(session: Session, run: Path, tmp_path: Path) -> None:
    """The checkpoint of round 2 claims another learning rate than that with which round 3 was trained."""
    for name in ("round-000002.h5", "best.h5"):
        reseal(run / "checkpoints" / name, lambda file: _replace(file, '"lr": 0.05', '"lr": 0.01'))
    result = session("verify", str(run), "--rounds", "9", cwd=tmp_path)
    assert result.code == 1 and "Traceback" not in result.err
    assert "round 3 of" in result.err and "round 2" not in result.err
    card = {line.split(",")[0]: line for line in result.out.splitlines() if "replayed on" in line}
    assert "train_loss" in card["| round 3"] and "the server's vector" in card["| round 3"]
    assert "the same bits" in card["| round 1"] and "the same bits" in card["| round 2"]


def test_undefined_numbers_are_the_same_bits(session: Session, tmp_path: Path) -> None:
    """One client of four trained, so that classes that it lacks have no prototype: NaN in the vector."""
    few = ("--algorithm", "fedproto", "--participation", "0.2", "--partition.kind", "pathological")
    result = session(*SMALL_RUN, *few, "--run.dir", "few", cwd=tmp_path)
    assert result.code == 0, result.err
    result = session("verify", "few", cwd=tmp_path)
    assert result.code == 0 and "the same bits" in result.out, result.out + result.err


def _replace(file: Any, old: str, new: str) -> None:
    """Change a setting in the configuration of a checkpoint."""
    text = file["config"][()].decode()
    assert old in text and len(old) == len(new)
    file["config"][()] = text.replace(old, new).encode()


def test_rounds_after_a_restart_with_other_settings_begin_at_checkpoints_alone(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    """Settings before the change are in checkpoints alone, so that round 1 cannot be replayed."""
    run_command("restart", run, "--rounds", "4", "--train.lr", "0.5")
    assert read_events(run)[2]["changes"]["train.lr"] == [0.05, 0.5]
    folder = RunFolder(run)
    starts = {source.after for source in _plan(folder, _open_kept(single_rank(), folder), 9)}
    assert 0 not in starts and 3 in starts
    assert run_command("verify", run, "--rounds", "2").code == 0


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_as_many_rounds_as_asked_for_are_drawn(run: Path, rounds: int) -> None:
    folder = RunFolder(run)
    plan = _plan(folder, _open_kept(single_rank(), folder), rounds)
    assert sum(source.rounds for source in plan) == rounds


def test_verify_refuses(assert_refused: Callable[..., str], run: Path, tmp_path: Path) -> None:
    assert_refused("not with another train.lr", "verify", run, "--train.lr", "0.5")
    assert_refused("rounds = 0 of `verify`", "verify", run, "--rounds", "0")
    (tmp_path / "empty").mkdir()
    assert_refused("no checkpoint of a complete round", "verify", "empty")
