"""The command `verify`: which rounds it replays, what it compares, and its card."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest

from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.commands.verify.command import _differences
from pfedmoe_mpi.commands.verify.replayable import plan
from pfedmoe_mpi.federation import metrics
from support.checkpoint_files import reseal
from support.files import flip_bit, path_digest
from support.launcher import SMALL_RUN, Result, Session, shared_session


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


def test_rows_of_an_earlier_version_have_fewer_numbers(trained: Path) -> None:
    with Checkpoint(trained / "checkpoints" / "round-000003.h5") as loaded:
        replayed = metrics.for_rank(loaded.history[-1], 0)
    earlier = {name: value for name, value in metrics.learning(replayed).items() if name not in metrics.LATER}
    earlier["clients"] = {n: v for n, v in earlier["clients"].items() if n not in metrics.LATER}
    assert "macro_f1" in replayed["clients"] and "macro_f1" not in earlier["clients"]
    assert _differences(earlier, replayed) == []
    earlier["clients"]["loss"][0] += 1e-9
    assert _differences(earlier, replayed) == ["clients"]


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


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_as_many_rounds_as_asked_for_are_drawn(rounds: int) -> None:
    assert sum(replay.rounds for replay in plan({0: 2, 2: 1, 3: 0}, rounds)) == rounds


def test_verify_refuses(assert_refused: Callable[..., str], run: Path, tmp_path: Path) -> None:
    assert_refused("not with another train.lr", "verify", run, "--train.lr", "0.5")
    assert_refused("rounds = 0 of `verify`", "verify", run, "--rounds", "0")
    (tmp_path / "empty").mkdir()
    assert_refused("empty is not a run folder: it has neither", "verify", "empty")
    assert_refused("there is no run folder .*nope", "verify", "nope")
    file = run / "checkpoints/round-000003.h5"
    message = assert_refused("round-000003.h5 is a file", "verify", file)
    assert f"remedy: verify {run}" in message
    for path in (run / "checkpoints").glob("*.h5"):
        path.unlink()
    message = assert_refused("no good checkpoint of a complete round", "verify", run)
    assert f"restart {run}" in message


@pytest.mark.parametrize("damaged", ["round-000002.h5", "round-000003.h5"])
def test_a_damaged_checkpoint_is_left_out(session: Session, run: Path, tmp_path: Path, damaged: str) -> None:
    (run / "checkpoints/best.h5").unlink()
    path = run / "checkpoints" / damaged
    flip_bit(path, path.stat().st_size // 2)
    result = session("verify", str(run), "--rounds", "9", cwd=tmp_path)
    assert result.code == 0 and result.err.count("warning: left out: ") == 1, result.err
    assert damaged in result.err
    rounds = 3 if damaged == "round-000002.h5" else 2
    assert result.out.count("the same bits") == rounds and f"| rounds | {rounds} of 3 |" in result.out


def test_tables_that_differ_from_the_last_checkpoint_are_found(
    session: Session, run: Path, run_command: Callable[..., Result], tmp_path: Path
) -> None:
    """A report shows what they say; the remedy gives them back."""
    table = run / "metrics.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    edited = {**rows[2], "accuracy": {**rows[2]["accuracy"], "mean": 0.99}}
    texts = {
        "round 3: accuracy": [rows[0], rows[1], edited],
        "round 2, which is missing": [rows[0], rows[2]],
        "round 2: train_loss": [*rows, {**rows[1], "train_loss": 0.1}],
    }
    for expected, changed in texts.items():
        table.write_text("".join(json.dumps(row) + "\n" for row in changed))
        result = session("verify", str(run), cwd=tmp_path)
        assert result.code == 1 and f"differ from its last checkpoint in {expected}\n" in result.err
        assert f"| metrics.jsonl and measured | differs in {expected} |" in result.out.splitlines()
    table.rename(table.with_suffix(".old"))
    run_command("restart", run)
    assert "| metrics.jsonl and measured | as the last checkpoint |" in run_command("verify", run).out


def test_edited_numbers_of_clients_are_found(session: Session, run: Path, tmp_path: Path) -> None:
    with h5py.File(run / "measured/000001.h5", "r+") as file:
        file["values"][-1] = 0.125
    result = session("verify", str(run), cwd=tmp_path)
    assert result.code == 1 and re.search(r"in round \d: \w+ by client\n", result.err), result.err
    (run / "measured/000001.h5").unlink()
    result = session("verify", str(run), cwd=tmp_path)
    assert result.code == 1 and "round 2: accuracy by client" in result.err, result.err


def test_a_run_killed_before_its_row_was_written_lacks_it(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    for name in ("metrics.jsonl", "events.jsonl"):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(lines[:-1]))
    assert "as the last checkpoint" in run_command("verify", run).out


def test_a_split_may_have_moved(
    run_command: Callable[..., Result], assert_refused: Callable[..., str], tmp_path: Path
) -> None:
    """A restart with the moved file changes nothing either; another split is refused, not replayed."""
    of_data = SMALL_RUN[:8]
    run_command("data", "partition", "split.h5", *of_data)
    run_command("data", "partition", "other.h5", *of_data, "--partition.kind", "iid")
    flags = ("--partition.file", "split.h5", "--rounds", "2", "--run.checkpoint_every", "1")
    run_command(*SMALL_RUN, *flags, "--run.dir", "run")
    (tmp_path / "split.h5").rename(tmp_path / "moved.h5")
    moved = ("--partition.file", "moved.h5")
    out = run_command("verify", "run", *moved, "--rounds", "9").out
    assert out.count("the same bits") == 2
    run_command("restart", "run", *moved, "--rounds", "3", "--run.keep", "9")
    out = run_command("verify", "run", "--rounds", "9").out
    assert out.count("the same bits") == 3 and "split.h5" not in out
    assert_refused("changed since the checkpoint", "verify", "run", "--partition.file", "other.h5")


@pytest.mark.parametrize("noise", ["0.5", "0"])
def test_the_card_of_a_run_with_noise_has_no_seed(
    run_command: Callable[..., Result], tmp_path: Path, noise: str
) -> None:
    """Whoever knows the seed draws the noise again; a clip alone has none."""
    gate = ("--gate.input_norm", "layer", "--gate.batch_norm", "false")
    private = ("--privacy.clip", "1", "--privacy.noise", noise, "--seed", "4711")
    run_command(*SMALL_RUN, *gate, *private, "--run.dir", "private")
    out = run_command("verify", "private").out
    assert ("4711" in out) == (noise == "0") != ("| seed | left out" in out)
