"""The wall-time limit from Slurm's variables, which may be left over from a job that is over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pfedmoe_mpi import environment
from support.launcher import run_program

END, LATER = 4_000_000_000, 4_000_000_300  # in the year 2096; constants, since every worker makes these names
PAST = 1_000_000_000
OVER = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
UNREACHABLE = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"


def set_squeue(folder: Path, script: str) -> str:
    """Write a `squeue` and return the PATH that has it first."""
    path = folder / "squeue"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("job", "end", "squeue", "expected"),
    [
        ("", LATER, f"echo 7 RUNNING {END}", None),  # a variable without a job
        ("7", LATER, f"echo 7 RUNNING {END}", END),
        ("7", "", f"echo 7 RUNNING {END}", END),
        ("7", "", "echo 7 RUNNING NONE", None),
        ("7", "", f"echo 8 RUNNING {END - 100}; echo 7 RUNNING {END}", END),  # an array
        ("7", LATER, OVER, None),  # ended early: the variable's time is still to come
        ("7", LATER, "", None),  # just over: Slurm still accepts its number
        ("7", LATER, f"echo 7 PENDING {END}", None),  # requeued; this process is not in it
        ("7", PAST, OVER, None),
        ("7", LATER, UNREACHABLE, LATER),
        ("7", LATER, "exit 127", LATER),
        ("7", "soon", UNREACHABLE, None),
    ],
)
def test_limit_is_that_of_a_running_job(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    job: str,
    end: object,
    squeue: str,
    expected: int | None,
) -> None:
    monkeypatch.setenv("PATH", set_squeue(tmp_path, squeue))
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(end))
    assert environment.slurm_end() == expected
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("squeue", "named"),
    [(UNREACHABLE, "SLURM_JOB_END_TIME"), (f"echo 7 RUNNING {PAST}", r"the end of job 7 (SLURM_JOB_ID)")],
)
def test_limit_in_the_past_is_named_and_ignored(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    squeue: str,
    named: str,
) -> None:
    monkeypatch.setenv("PATH", set_squeue(tmp_path, squeue))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(PAST))
    assert environment.slurm_end() is None
    note = capsys.readouterr().err
    assert note.startswith(f"note: {named} = {PAST} is in the past (") and "--run.walltime" in note


def test_run_in_the_session_of_an_ended_job_trains(small_run: tuple[str, ...], tmp_path: Path) -> None:
    left_over = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(PAST)}
    env = {**left_over, "PATH": set_squeue(tmp_path, OVER)}
    result = run_program(1, *small_run, "--run.dir", "run", cwd=tmp_path, env=env)
    assert result.code == 0 and "round 1/1" in result.out and result.err == "", result.out + result.err
