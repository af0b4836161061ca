"""The command `restart`: where a run goes on, what it keeps and what it says."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from launcher import Result, digest, events, learned, rows

from pfedmoe_mpi.checkpoint import Checkpoint


def test_going_on_with_a_run(
    done: Callable[..., Result], small: tuple[str, ...], run: Path, tmp_path: Path
) -> None:
    """Three rounds and one more are four: the same rows, the same bits."""
    result = done("restart", run, "--rounds", "4", "--run.keep", "9", "--train.lr-gate", "0.1")
    assert "round 4/4" in result.out and "round 3/4" not in result.out and "warning" not in result.err
    whole = ("--rounds", "4", "--eval.every", "2", "--run.checkpoint_every", "1", "--run.dir", "whole")
    done(*small, *whole)
    # Round 3 was the last of the first run, so it was measured there.
    assert [row["round"] for row in rows(run)] == [1, 2, 3, 4]
    assert learned(run)[3] == learned(tmp_path / "whole")[3]
    with (
        Checkpoint(run / "checkpoints" / "round-000004.h5") as again,
        Checkpoint(tmp_path / "whole" / "checkpoints" / "round-000004.h5") as one,
    ):
        np.testing.assert_array_equal(again.state, one.state)
        for client in range(4):
            np.testing.assert_array_equal(again.vector(client), one.vector(client))
    restart, end = events(run)[2:]
    assert (restart["event"], restart["checkpoint"], restart["round"]) == ("restart", "round-000003.h5", 3)
    assert restart["changes"] == {"rounds": [3, 4], "run.keep": [3, 9]}
    assert end["event"] == "finish" and end["round"] == 4
    assert tomllib.loads((run / "config.toml").read_text())["rounds"] == 4
    assert len(list((run / "checkpoints").glob("round*"))) == 4


def test_metrics_are_rewritten_from_the_checkpoint(done: Callable[..., Result], run: Path) -> None:
    kept = learned(run)
    (run / "checkpoints" / "round-000003.h5").unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"round": 99}\n{"rou')
    done("restart", run)
    assert learned(run) == kept, "round 3 again, the same bits, and nothing of the broken lines"


def test_the_newest_good_checkpoint_is_taken(done: Callable[..., Result], run: Path, tmp_path: Path) -> None:
    kept = learned(run)
    newest = run / "checkpoints" / "round-000003.h5"
    newest.write_bytes(newest.read_bytes()[:-5])
    result = done("restart", run)
    assert result.err.startswith("warning: ") and "round-000003.h5 is truncated" in result.err
    assert events(run)[2]["checkpoint"] == "round-000002.h5"
    assert "round-000003.h5 is truncated" in events(run)[2]["warnings"][0]
    assert learned(run) == kept and done("inspect", newest).code == 0
    for path in (run / "checkpoints").glob("round*"):
        path.unlink()
    done("restart", run)
    assert learned(run) == kept, "without a checkpoint from round 0 of config.toml"


def test_one_checkpoint_goes_on_in_another_folder(
    done: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    before = digest(run)
    for number, name in ((2, "older"), (3, "newest")):
        done("restart", run / "checkpoints" / f"round-{number:06d}.h5", "--rounds", "4", "--run.dir", name)
        assert [row["round"] for row in rows(tmp_path / name)] == [1, 2, 3, 4]
        assert learned(tmp_path / name)[:number] == learned(run)[:number]
    done("restart", run, "--rounds", "4", "--run.dir", "folder")
    assert learned(tmp_path / "folder") == learned(tmp_path / "newest")
    assert digest(run) == before


def test_a_run_that_was_moved_goes_on_where_it_is(
    done: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    done("restart", run.rename(tmp_path / "moved"), "--rounds", "4")
    assert not run.exists() and len(rows(tmp_path / "moved")) == 4


def test_other_threads_are_allowed_and_said(done: Callable[..., Result], run: Path) -> None:
    result = done("restart", run, "--rounds", "4", "--train.threads", "2")
    assert "bits will differ" in result.err and "threads 1 → 2" in result.err
    assert events(run)[2]["changes"]["train.threads"] == [1, 2]
    same = done("restart", run, "--rounds", "5")
    assert "bits will differ" not in same.err


def test_a_schedule_that_is_stretched_is_said(
    done: Callable[..., Result], small: tuple[str, ...], tmp_path: Path
) -> None:
    done(*small, "--train.schedule", "linear", "--run.dir", "run")
    assert "linear learning rate ends at round 2, no more at 1" in done("restart", "run", "--rounds", "2").err
    assert "learning rate" not in done("restart", "run").err
