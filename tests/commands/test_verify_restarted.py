"""The command `verify` on runs that were forked, restarted or stopped: no false difference, and the card."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.launcher import SMALL_RUN, Result, read_events
from support.mpi_job import run_module
from support.paths import ROOT

Command = Callable[..., Result]
FORK = ("--gate.weights", "equal")


def verified(run_command: Command, run: str | Path) -> tuple[list[int], str]:
    """Return the rounds that `verify` replayed, all of them with the same bits, and the card."""
    card = run_command("verify", run, "--rounds", "99").out
    rounds = re.findall(r"^\| round (\d+), replayed on", card, re.MULTILINE)
    assert card.count("the same bits") == len(rounds)
    return list(map(int, rounds)), card


def test_no_round_to_replay_is_an_error(
    run_command: Command, assert_refused: Callable[..., str], run: Path, tmp_path: Path
) -> None:
    """The rounds before a fork's only checkpoint are of another folder; the remedy trains some of its own."""
    run_command("fork", run, "--at", "2", *FORK, "--run.keep", "1", "--run.dir", "fork")
    (tmp_path / "fork/checkpoints/best.h5").unlink()
    message = assert_refused("no round of .*fork can be replayed: .* round 3 alone", "verify", "fork")
    command = re.findall(r"`(restart .*?)`", message)[0].split()
    run_command(*command)
    assert verified(run_command, "fork")[0] == [5, 6]
    file = run / "checkpoints/round-000003.h5"
    for path in (run / "checkpoints").glob("*.h5"):
        if path != file:
            path.unlink()
    run_command("restart", file, "--rounds", "4", "--run.keep", "1", "--run.dir", "moved")
    assert_refused("no round of .*moved can be replayed", "verify", "moved")
    (tmp_path / "moved/checkpoints/round-000004.h5").rename(tmp_path / "moved/checkpoints/best.h5")
    assert_refused("no round of .*moved can be replayed", "verify", "moved")


def test_rounds_before_a_restart_are_replayed_with_their_settings(run_command: Command, run: Path) -> None:
    """Those before round 1 are the last checkpoint's without the changes that events.jsonl tells."""
    run_command("restart", run, "--rounds", "4", "--train.lr", "0.01", "--run.keep", "1")
    assert read_events(run)[2]["changes"]["train.lr"] == [0.05, 0.01]
    rounds, card = verified(run_command, run)
    assert rounds == [1, 2, 3] and "| rounds that cannot be replayed | 4: no checkpoint leads to" in card
    assert "| from round 4 on | rounds 3 → 4, train.lr 0.05 → 0.01 |" in card.splitlines()
    run_command("restart", run, "--rounds", "6", "--train.lr", "0.02", "--run.keep", "9")
    rounds, card = verified(run_command, run)
    assert rounds == [1, 2, 3, 5, 6]
    assert "| from round 5 on | rounds 4 → 6, train.lr 0.01 → 0.02 |" in card.splitlines()


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_schedule_by_the_number_of_rounds(run_command: Command, schedule: str, tmp_path: Path) -> None:
    """Without one, rounds after a restart with more of them can be replayed from before it."""
    flags = ("--train.schedule", schedule, "--rounds", "2", "--run.keep", "1", "--run.dir", "run")
    run_command(*SMALL_RUN, *flags, "--train.epochs", "2")
    run_command("restart", "run", "--rounds", "4")
    rounds, card = verified(run_command, "run")
    assert rounds == ([1, 2] if schedule == "cosine" else [1, 2, 3, 4])
    assert ("cannot be replayed | 3 to 4:" in card) == (schedule == "cosine")


def test_forks_begin_at_their_first_checkpoint(run_command: Command, run: Path) -> None:
    """That of a fork changes nothing but the number of rounds; another is resumed in a third folder."""
    run_command("fork", run, "--at", "2", *FORK, "--run.keep", "9", "--run.dir", "fork")
    rounds, card = verified(run_command, "fork")
    assert rounds == [3] and "| rounds that cannot be replayed | 1 to 2: no checkpoint" in card
    assert "| from round 3 on | gate.weights sample → equal, forked from run |" in card.splitlines()
    run_command("fork", "fork", "--at", "3", "--rounds", "4", "--run.dir", "again")
    rounds, card = verified(run_command, "again")
    assert rounds == [4] and "| from round 4 on | rounds 3 → 4, forked from fork |" in card
    file = "fork/checkpoints/round-000003.h5"
    run_command("restart", file, "--rounds", "5", "--run.dir", "elsewhere")
    rounds, card = verified(run_command, "elsewhere")
    assert rounds == [4, 5]
    assert "on | rounds 3 → 5, resumed from round-000003.h5 of another run folder |" in card


def test_changes_of_an_earlier_folder_are_not_known(run_command: Command, run: Path) -> None:
    run_command("restart", run, "--rounds", "4", "--train.lr", "0.01")
    run_command("restart", run / "checkpoints/round-000004.h5", "--rounds", "5", "--run.dir", "moved")
    assert verified(run_command, "moved")[0] == [5]


def test_a_round_that_a_restart_changed_within(run_command: Command, tmp_path: Path) -> None:
    """It had both learning rates, so it cannot be replayed; nor can what has no checkpoint of its own."""
    flags = (*SMALL_RUN, "--rounds", "5", "--run.checkpoint_every", "4", "--run.keep", "9")
    stop = ("fault_injection", "stop", "0", "training:10")  # the second client of round 3
    ended = run_module(*stop, *flags, "--run.dir", str(tmp_path / "run"), ranks=1)
    assert ended.code == 75, ended.output
    assert (tmp_path / "run/checkpoints/round-000003-partial.h5").exists()
    run_command("restart", "run", "--train.lr", "0.2")
    rounds, card = verified(run_command, "run")
    assert rounds == [1, 2, 5] and "| rounds that cannot be replayed | 3 to 4: no" in card
    assert "| from within round 3 on | train.lr 0.05 → 0.2 |" in card


def test_a_restart_before_a_changed_one_takes_its_place(run_command: Command, run: Path) -> None:
    """The settings of rounds that were trained again are those of the checkpoint before them."""
    run_command("restart", run, "--rounds", "5", "--train.lr", "0.01", "--run.keep", "9")
    for name in ("round-000003.h5", "round-000004.h5", "round-000005.h5", "best.h5"):
        (run / "checkpoints" / name).unlink()
    run_command("restart", run, "--rounds", "4")
    rounds, card = verified(run_command, run)
    assert rounds == [1, 2, 3, 4] and "train.lr 0.05" not in card and "| from round 3 on | rounds" in card


def test_settings_that_no_event_explains(run_command: Command, run: Path) -> None:
    """Without its events a folder of checkpoints does not say when a setting changed."""
    run_command("restart", run, "--rounds", "5", "--train.lr", "0.01", "--run.keep", "9")
    (run / "events.jsonl").unlink()
    rounds, card = verified(run_command, run)
    assert rounds == [4, 5] and "cannot be replayed | 1 to 3" in card


def test_rounds_of_other_code_are_left_out(run_command: Command, tmp_path: Path) -> None:
    """A restart changed the user's own code; a checkpoint holds the texts, and they are not run."""
    shutil.copytree(ROOT / "tests/strangers", tmp_path / "code", ignore=shutil.ignore_patterns("__pycache__"))
    method = tmp_path / "code/near.py"
    flags = ("--algorithm", str(method), "--model.pool", "mlp5", "--run.checkpoint_every", "1")
    run_command(*SMALL_RUN, *flags, "--rounds", "2", "--run.keep", "9", "--run.dir", "run")
    assert verified(run_command, "run")[0] == [1, 2]
    method.write_text(method.read_text() + "\nEXTRA = 1\n")
    run_command("restart", "run", "--rounds", "4", "--run.changed_code", "true")
    rounds, card = verified(run_command, "run")
    assert rounds == [3, 4] and "| rounds that cannot be replayed | 1 to 2: no" in card
