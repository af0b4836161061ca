"""The command `restart`: where a run resumes, what it keeps and what it prints."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pfedmoe_mpi.checkpoint import Checkpoint, verify
from pfedmoe_mpi.run.folder import RunFolder
from support.files import flip_bit, path_digest
from support.launcher import (
    SMALL_RUN,
    Result,
    Session,
    error_message,
    read_events,
    read_metrics,
    reproducible_rows,
)
from support.mpi_job import run_module


def test_restart_for_one_more_round_gives_the_same_bits(
    run_command: Callable[..., Result], small_run: tuple[str, ...], run: Path, tmp_path: Path
) -> None:
    """Three rounds and one more equal four: the same rows, the same bits."""
    result = run_command("restart", run, "--rounds", "4", "--run.keep", "9", "--train.lr-gate", "0.1")
    assert "round 4/4" in result.out and "round 3/4" not in result.out and "warning" not in result.err
    whole = ("--rounds", "4", "--eval.every", "2", "--run.checkpoint_every", "1", "--run.dir", "whole")
    run_command(*small_run, *whole)
    # Round 3 was the last of the first run, so it was measured there.
    assert [row["round"] for row in read_metrics(run)] == [1, 2, 3, 4]
    assert reproducible_rows(run)[3] == reproducible_rows(tmp_path / "whole")[3]
    with (
        Checkpoint(run / "checkpoints" / "round-000004.h5") as again,
        Checkpoint(tmp_path / "whole" / "checkpoints" / "round-000004.h5") as one,
    ):
        np.testing.assert_array_equal(again.state, one.state)
        for client in range(4):
            np.testing.assert_array_equal(again.vector(client), one.vector(client))
    restart, end = read_events(run)[2:]
    assert (restart["event"], restart["checkpoint"], restart["round"]) == ("restart", "round-000003.h5", 3)
    assert restart["changes"] == {"rounds": [3, 4], "run.keep": [2, 9]}
    assert end["event"] == "finish" and end["round"] == 4
    assert tomllib.loads((run / "config.toml").read_text())["rounds"] == 4
    assert len(list((run / "checkpoints").glob("round*"))) == 3, "2 and 3, kept by the first run, and 4"


@pytest.mark.parametrize("words", [("restart", "--rounds", "9"), ("fork", "--at", "2", "--run.dir", "new")])
def test_dry_run_prints_what_would_change_and_writes_nothing(
    run_command: Callable[..., Result], run: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    before = {path: path_digest(path) for path in tmp_path.rglob("*") if path.is_file()}
    result = run_command(words[0], run, *words[1:], "--train.lr", "0.02", "--train.augment", "flip", "--dry")
    assert "changed: train.lr from 0.05 to 0.02\n" in result.out, result.out
    assert "changed: train.augment from none to flip\n" in result.out, result.out
    assert ("changed: rounds from 3 to 9\n" in result.out) is (words[0] == "restart")
    assert "\ndisk: up to" in result.out and "round 4" not in result.out
    assert {path: path_digest(path) for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_metrics_are_rewritten_from_the_checkpoint(run_command: Callable[..., Result], run: Path) -> None:
    kept = reproducible_rows(run)
    (run / "checkpoints" / "round-000003.h5").unlink()
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"round": 99}\n{"rou')
    run_command("restart", run)
    assert reproducible_rows(run) == kept, "round 3 again, the same bits, and nothing of the broken lines"


def test_restart_takes_the_newest_good_checkpoint(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    kept = reproducible_rows(run)
    newest = run / "checkpoints" / "round-000003.h5"
    newest.write_bytes(newest.read_bytes()[:-5])
    result = run_command("restart", run)
    assert result.err.startswith("warning: ") and "round-000003.h5 is truncated" in result.err
    assert read_events(run)[2]["checkpoint"] == "round-000002.h5"
    assert "round-000003.h5 is truncated" in read_events(run)[2]["warnings"][0]
    assert reproducible_rows(run) == kept and run_command("inspect", newest).code == 0
    for path in (run / "checkpoints").glob("round*"):
        path.unlink()
    run_command("restart", run)
    assert reproducible_rows(run) == kept, "without a checkpoint from round 0 of config.toml"


def test_restart_from_a_checkpoint_uses_another_folder(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    before = path_digest(run)
    for number, name in ((2, "older"), (3, "newest")):
        run_command(
            "restart", run / "checkpoints" / f"round-{number:06d}.h5", "--rounds", "4", "--run.dir", name
        )
        assert [row["round"] for row in read_metrics(tmp_path / name)] == [1, 2, 3, 4]
        assert reproducible_rows(tmp_path / name)[:number] == reproducible_rows(run)[:number]
    run_command("restart", run, "--rounds", "4", "--run.dir", "folder")
    assert reproducible_rows(tmp_path / "folder") == reproducible_rows(tmp_path / "newest")
    assert path_digest(run) == before


@pytest.mark.parametrize("to", ["run", "new"])
def test_run_killed_early_keeps_changed_settings(
    run_command: Callable[..., Result], run: Path, tmp_path: Path, to: str
) -> None:
    """The state is that of a kill just before the last checkpoint, the only one since this restart."""
    source = run if to == "run" else run / "checkpoints" / "round-000002.h5"
    new = () if to == "run" else ("--run.dir", to)
    run_command("restart", source, *new, "--rounds", "5", "--train.lr", "0.01", "--run.checkpoint-every", "9")
    kept = reproducible_rows(tmp_path / to)
    (tmp_path / to / "checkpoints" / "round-000005.h5").unlink()
    run_command("restart", to)
    assert reproducible_rows(tmp_path / to) == kept and len(kept) == 5


def test_run_killed_after_its_last_checkpoint_is_finished(
    run_command: Callable[..., Result], run: Path
) -> None:
    """The restart writes what is missing; if nothing is missing, it writes nothing."""
    kept = reproducible_rows(run)
    for name in ("metrics.jsonl", "events.jsonl"):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(lines[:-1]))
    assert "the run is finished: 3 of 3" in run_command("restart", run).out
    resumed = run_command("restart", run, "--rounds", "4", "--run.dir", "more").out
    source = run.resolve() / "checkpoints" / "round-000003.h5"
    assert f"more, resumes after round 3 from {source}\n" in resumed
    assert read_events(run.with_name("more"))[0]["source"] == str(source)
    assert reproducible_rows(run) == kept and read_events(run)[-1]["event"] == "finish"
    before = path_digest(run)
    run_command("restart", run)
    assert path_digest(run) == before


def test_damaged_best_checkpoint_is_replaced(run_command: Callable[..., Result], run: Path) -> None:
    best = run / "checkpoints" / "best.h5"
    with Checkpoint(best) as held:
        top = held.round
    for path in (best, *(run / "checkpoints" / f"round-{n:06d}.h5" for n in range(top, 4))):
        flip_bit(path, path.stat().st_size - 1)
    assert "damaged" in run_command("restart", run).err
    verify(best)


def test_damaged_newer_checkpoints_are_set_aside(tmp_path: Path) -> None:
    """Otherwise, after a fallback, rounds 4 and 5 would look older than a damaged round 6."""
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    for name in ("round-000006.h5", "round-000005-partial.h5", "round-000004.h5", "round-000003.h5"):
        (folder.checkpoints / name).touch()
    folder.keep_newest(1, folder.checkpoints / "round-000005-partial.h5")
    left = {path.name for path in folder.checkpoints.iterdir()}
    assert left == {"round-000006.h5.unused", "round-000005-partial.h5", "round-000004.h5"}


def test_event_after_a_partial_line_is_read(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n{"event": "fin')
    folder = RunFolder(tmp_path)
    folder.event("restart")
    folder.event("finish")
    assert [event["event"] for event in folder._events()] == ["start", "restart", "finish"]


def test_unwritable_folder_is_reported(session: Session, run: Path, tmp_path: Path) -> None:
    (run / "config.toml").unlink()
    (run / "config.toml" / "in the way").mkdir(parents=True)
    error_message(session("restart", "run", "--rounds", "4", cwd=tmp_path), "cannot be written(.|\n)*run.dir")


def test_fewer_rounds_than_completed_are_refused(session: Session, run: Path, tmp_path: Path) -> None:
    said = error_message(
        session("restart", "run", "--rounds", "2", cwd=tmp_path), "3 rounds are done; --rounds is"
    )
    assert "--rounds 5 trains 2 more" in said


def test_folder_is_not_a_checkpoint(session: Session, run: Path, tmp_path: Path) -> None:
    for command in ("inspect", "evaluate"):
        error_message(session(command, "run", cwd=tmp_path), "run is a folder(.|\n)*run/checkpoints/best.h5")


def test_changed_normalisation_is_refused(session: Session, run: Path, tmp_path: Path) -> None:
    changed = ("--data.mean", "9,9,9", "--data.std", "1,1,1", "--rounds", "4")
    error_message(session("restart", "run", *changed, cwd=tmp_path), "cannot be changed now: data.mean")


def test_unmeasured_members_leave_the_cohort_mean_null(
    run_command: Callable[..., Result], tmp_path: Path
) -> None:
    """The run stops in a round without evaluation, which has one after the restart."""
    flags = (*SMALL_RUN, "--rounds", "2", "--eval.every", "2", "--run.dir", str(tmp_path / "run"))
    assert run_module("fault_injection", "stop", "0", "training", *flags, ranks=1).code == 75
    partial = tmp_path / "run" / "checkpoints" / "round-000001-partial.h5"
    assert "except clients 0" in run_command("evaluate", partial).out
    run_command("restart", "run", "--eval.every", "1")
    first, second = read_metrics(tmp_path / "run")
    assert first["accuracy_cohort"]["mean"] is None and first["accuracy"]["mean"] is not None
    assert second["accuracy_cohort"]["mean"] is not None


def test_moved_run_resumes_in_its_new_folder(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    run_command("restart", run.rename(tmp_path / "moved"), "--rounds", "4")
    assert not run.exists() and len(read_metrics(tmp_path / "moved")) == 4


def test_changed_threads_are_allowed_and_announced(run_command: Callable[..., Result], run: Path) -> None:
    result = run_command("restart", run, "--rounds", "4", "--train.threads", "2")
    assert "bits will differ" in result.err and "threads 1 → 2" in result.err
    assert read_events(run)[2]["changes"]["train.threads"] == [1, 2]
    same = run_command("restart", run, "--rounds", "5")
    assert "bits will differ" not in same.err


def test_stretched_schedule_is_announced(
    run_command: Callable[..., Result], small_run: tuple[str, ...], tmp_path: Path
) -> None:
    run_command(*small_run, "--train.schedule", "linear", "--run.dir", "run")
    assert (
        "the linear schedule now ends at round 2 instead of 1"
        in run_command("restart", "run", "--rounds", "2").err
    )
    assert "learning rate" not in run_command("restart", "run").err
