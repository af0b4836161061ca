"""The command `restart`: where a run goes on, what it keeps and what it says."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pfedmoe_mpi.checkpoint import Checkpoint, verify
from pfedmoe_mpi.run.folder import RunFolder
from support.launcher import SMALL, Result, Session, digest, events, flip, learned, rows, told
from support.mpi_job import mpirun


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


@pytest.mark.parametrize("to", ["run", "new"])
def test_killed_before_its_first_checkpoint_it_goes_on_as_it_was_changed(
    done: Callable[..., Result], run: Path, tmp_path: Path, to: str
) -> None:
    """As if the kill had come just before the last checkpoint, the only one of this leg's interval."""
    source = run if to == "run" else run / "checkpoints" / "round-000002.h5"
    new = () if to == "run" else ("--run.dir", to)
    done("restart", source, *new, "--rounds", "5", "--train.lr", "0.01", "--run.checkpoint-every", "9")
    kept = learned(tmp_path / to)
    (tmp_path / to / "checkpoints" / "round-000005.h5").unlink()
    done("restart", to)
    assert learned(tmp_path / to) == kept and len(kept) == 5


def test_killed_after_its_last_checkpoint_it_is_finished(done: Callable[..., Result], run: Path) -> None:
    """What it had still to write is written by the restart; with it all there, nothing is."""
    kept = learned(run)
    for name in ("metrics.jsonl", "events.jsonl"):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(lines[:-1]))
    assert "the run is finished: 3 of 3" in done("restart", run).out
    assert learned(run) == kept and events(run)[-1]["event"] == "finish"
    before = digest(run)
    done("restart", run)
    assert digest(run) == before


def test_a_damaged_best_is_replaced(done: Callable[..., Result], run: Path) -> None:
    best = run / "checkpoints" / "best.h5"
    with Checkpoint(best) as held:
        top = held.round
    for path in (best, *(run / "checkpoints" / f"round-{n:06d}.h5" for n in range(top, 4))):
        flip(path, path.stat().st_size - 1)
    assert "damaged" in done("restart", run).err
    verify(best)


def test_what_seems_newer_than_the_newest_is_set_aside(tmp_path: Path) -> None:
    """After a fallback: else rounds 4 and 5 would look overtaken by a damaged round 6."""
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    for name in ("round-000006.h5", "round-000005-partial.h5", "round-000004.h5", "round-000003.h5"):
        (folder.checkpoints / name).touch()
    folder.keep_newest(1, folder.checkpoints / "round-000005-partial.h5")
    left = {path.name for path in folder.checkpoints.iterdir()}
    assert left == {"round-000006.h5.unused", "round-000005-partial.h5", "round-000004.h5"}


def test_an_event_after_half_a_line_is_read(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n{"event": "fin')
    folder = RunFolder(tmp_path)
    folder.event("restart")
    folder.event("finish")
    assert [event["event"] for event in folder._events()] == ["start", "restart", "finish"]


def test_a_folder_that_cannot_be_written_is_told(session: Session, run: Path, tmp_path: Path) -> None:
    (run / "config.toml").unlink()
    (run / "config.toml" / "in the way").mkdir(parents=True)
    told(session("restart", "run", "--rounds", "4", cwd=tmp_path), "cannot be written(.|\n)*run.dir")


def test_fewer_rounds_than_are_done_are_refused(session: Session, run: Path, tmp_path: Path) -> None:
    said = told(session("restart", "run", "--rounds", "2", cwd=tmp_path), "3 rounds are done; --rounds is")
    assert "--rounds 5 trains 2 more" in said


def test_a_folder_is_no_checkpoint(session: Session, run: Path, tmp_path: Path) -> None:
    for command in ("inspect", "evaluate"):
        told(session(command, "run", cwd=tmp_path), "run is a folder(.|\n)*run/checkpoints/best.h5")


def test_another_normalisation_is_another_federation(session: Session, run: Path, tmp_path: Path) -> None:
    changed = ("--data.mean", "9,9,9", "--data.std", "1,1,1", "--rounds", "4")
    told(session("restart", "run", *changed, cwd=tmp_path), "cannot be changed now: data.mean")


def test_members_that_were_not_measured_leave_the_cohort_without_a_mean(
    done: Callable[..., Result], tmp_path: Path
) -> None:
    """Stopped in a round that was not due, which is due after the restart."""
    flags = (*SMALL, "--rounds", "2", "--eval.every", "2", "--run.dir", str(tmp_path / "run"))
    assert mpirun("fault_injection", "stop", "0", "training", *flags, ranks=1).code == 75
    partial = tmp_path / "run" / "checkpoints" / "round-000001-partial.h5"
    assert "but clients 0" in done("evaluate", partial).out
    done("restart", "run", "--eval.every", "1")
    first, second = rows(tmp_path / "run")
    assert first["accuracy_cohort"]["mean"] is None and first["accuracy"]["mean"] is not None
    assert second["accuracy_cohort"]["mean"] is not None


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
    assert (
        "the linear schedule now ends at round 2 instead of 1" in done("restart", "run", "--rounds", "2").err
    )
    assert "learning rate" not in done("restart", "run").err
