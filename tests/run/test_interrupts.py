"""Ctrl-C: twice in a row, in a job that stands still, and while the program starts."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from pfedmoe_mpi import checkpoint
from support import launcher
from support.launcher import SMALL_RUN, Result, rank_processes, running_job, wait_for_end, wait_for_file

LONG = (*SMALL_RUN, "--rounds", "50", "--train.epochs", "300", "--run.dir", "run")
BOTH = ["mpich", pytest.param("openmpi", marks=pytest.mark.openmpi)]


def interrupt_twice(pids: list[int], seconds: float) -> None:
    for wait in (seconds, 0.0):
        for pid in pids:
            os.kill(pid, signal.SIGINT)
        time.sleep(wait)


def interrupted(tmp_path: Path, mpi: str, to: str) -> Result:
    """Return the result of a job in training whose ranks, or whose mpirun too, get two SIGINT in 20 ms."""
    with running_job(2, *LONG, cwd=tmp_path, mpi=mpi) as job:
        wait_for_file(tmp_path / "run" / "events.jsonl", job)
        ranks = list(rank_processes(job.pid).values())
        interrupt_twice([job.pid] if to == "mpirun" else ranks, 0.02)
        return wait_for_end(job, 60)


@pytest.mark.parametrize("mpi", BOTH)
def test_two_quick_interrupts_of_the_ranks_are_one_stop(tmp_path: Path, mpi: str) -> None:
    result = interrupted(tmp_path, mpi, "ranks")
    assert result.code == 75, result.out + result.err
    assert result.out.count("stopped by SIGINT") == 1 and "Ctrl-C" not in result.err
    assert checkpoint.newest_first(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("mpi", BOTH)
def test_two_interrupts_of_mpirun_end_the_job_with_its_code(tmp_path: Path, mpi: str) -> None:
    """The launcher ends the job itself; the ranks add nothing, and the run can be resumed."""
    result = interrupted(tmp_path, mpi, "mpirun")
    assert result.code == {"mpich": 255, "openmpi": 1}[mpi], result.out + result.err
    assert "Traceback" not in result.err and "second Ctrl-C" not in result.err
    again = launcher.run_program(
        1, "restart", "run", "--rounds", "1", "--train.epochs", "1", cwd=tmp_path, mpi=mpi
    )
    assert again.code == 0, again.err


def test_later_interrupt_ends_a_job_that_stands_still(tmp_path: Path) -> None:
    """Rank 1 does not answer, so the stop cannot end; all ranks but this one get both signals."""
    with running_job(3, *LONG, cwd=tmp_path) as job:
        wait_for_file(tmp_path / "run" / "events.jsonl", job)
        ranks = rank_processes(job.pid)
        os.kill(ranks[1], signal.SIGSTOP)
        interrupt_twice([ranks[0], ranks[2]], 1.5)
        result = wait_for_end(job, 60)
    assert result.code == 1 and result.err.count("second Ctrl-C: the job ends at once") == 1, result.err


@pytest.mark.parametrize("library", ["numpy", "libtorch_cpu"])
@pytest.mark.parametrize("ranks", [0, 2])
def test_interrupt_during_imports_is_silent(tmp_path: Path, library: str, ranks: int) -> None:
    for attempt in range(5):
        with running_job(ranks, *LONG, "--run.dir", f"run{attempt}", cwd=tmp_path) as job:
            wait_for_library(job.pid, library, ranks)
            for pid in rank_processes(job.pid).values() if ranks else [job.pid]:
                os.kill(pid, signal.SIGINT)
            result = wait_for_end(job, 60)
        if "stopped by SIGINT" not in result.out + result.err:
            break  # on a busy machine the signal may come only after the imports
    assert result.code in ({130} if ranks else {-signal.SIGINT}), result.out + result.err
    assert (result.out, result.err) == ("", "")
    assert not (tmp_path / f"run{attempt}").exists()


def wait_for_library(mpirun: int, library: str, ranks: int) -> None:
    """Wait until a rank has loaded a library."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for pid in rank_processes(mpirun).values() if ranks else [mpirun]:
            try:
                if library in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8"):
                    return
            except OSError:
                continue
        time.sleep(0.001)
    raise AssertionError(f"no rank loaded {library}")
