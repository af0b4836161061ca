"""When a run writes checkpoints: after round 1, by rounds, and by the clock."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from pfedmoe_mpi.checkpoint import Checkpoint
from support.launcher import (
    SMALL_RUN,
    Result,
    checkpoint_digest,
    descendants,
    rank_processes,
    read_events,
    run_to_end,
    running_job,
    wait_for_end,
    wait_for_file,
)

FLAGS = (*SMALL_RUN, "--rounds", "6", "--run.checkpoint_every", "100", "--run.keep", "9")


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("round-*"))


def test_clock_adds_checkpoints_and_changes_no_bit(
    run_command: Callable[..., Result], tmp_path: Path
) -> None:
    run_command(*FLAGS, "--run.checkpoint_minutes", "0", "--run.dir", "rounds")
    assert checkpoints(tmp_path / "rounds") == ["round-000001.h5", "round-000006.h5"]
    run_to_end(2, *FLAGS, "--run.checkpoint_minutes", "1e-9", "--run.dir", "clock", cwd=tmp_path)
    assert checkpoints(tmp_path / "clock") == [f"round-{round:06d}.h5" for round in range(1, 7)]
    for round in (1, 6):
        assert checkpoint_digest(tmp_path / "clock", round) == checkpoint_digest(tmp_path / "rounds", round)
    best = [Checkpoint(tmp_path / run / "checkpoints" / "best.h5") for run in ("clock", "rounds")]
    assert best[0].round == best[1].round, "a checkpoint by the clock does not become best.h5"


def test_run_killed_in_round_2_resumes_after_round_1(tmp_path: Path) -> None:
    long = ("--train.epochs", "40", "--run.dir", "run")
    with running_job(2, *FLAGS, *long, cwd=tmp_path) as job:
        wait_for_file(tmp_path / "run" / "metrics.jsonl", job)
        for pid in [*rank_processes(job.pid).values(), *descendants(job.pid)]:
            os.kill(pid, signal.SIGKILL)
        wait_for_end(job, 60)
    run_to_end(1, "restart", "run", "--rounds", "2", "--train.epochs", "1", cwd=tmp_path)
    restart = read_events(tmp_path / "run")[1]
    assert (restart["event"], restart["round"], restart["checkpoint"]) == ("restart", 1, "round-000001.h5")
    assert not (tmp_path / "run" / "metrics.jsonl.1").exists(), "no round is trained again"
