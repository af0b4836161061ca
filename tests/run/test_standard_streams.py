"""Readers that leave, closed or full output, and few open files: every command ends with one clear word."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support.launcher import SMALL_RUN, Result, clean_environment, error_message, read_metrics

SMALL = shlex.join(SMALL_RUN)


def shell(command: str, cwd: Path) -> Result:
    """Return the result of bash, where `PROGRAM` is the program; with `pipefail`."""
    line = "set -o pipefail; " + command.replace("PROGRAM", f"{shlex.quote(sys.executable)} -m pfedmoe_mpi")
    result = subprocess.run(
        ["bash", "-c", line],
        cwd=cwd,
        env=clean_environment("mpich", {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Result(result.returncode, result.stdout, result.stderr)


LEFT = "| (read line; echo $line)"  # a reader that leaves after a line


@pytest.mark.parametrize(
    "command",
    [
        f"run {SMALL} --dry true",
        f"run {SMALL} --rounds 2 --run.dir new",
        "inspect run/checkpoints/best.h5",
        "evaluate run/checkpoints/best.h5",
        "report run --text true",
        "help run",
    ],
)
def test_reader_that_leaves_ends_quietly(run: Path, tmp_path: Path, command: str) -> None:
    result = shell(f"PROGRAM {command} {LEFT}", tmp_path)
    assert (result.code, result.err) == (0, ""), result.err
    assert result.out.count("\n") == 1
    if "--rounds 2" in command:
        assert len(read_metrics(tmp_path / "new")) == 2, "the training goes on"


@pytest.mark.parametrize("command", [f"run {SMALL} --run.dir new", "report run --text true", "inspect none"])
def test_closed_output_is_no_hindrance(run: Path, tmp_path: Path, command: str) -> None:
    result = shell(f"PROGRAM {command} >&-", tmp_path)
    if command == "inspect none":
        error_message(result, "there is no checkpoint")
    else:
        assert (result.code, result.err) == (0, ""), result.err


def test_full_output_is_reported_after_the_work(run: Path, tmp_path: Path) -> None:
    result = shell("PROGRAM inspect run/checkpoints/best.h5 > /dev/full", tmp_path)
    assert result.code == 1
    assert result.err == "warning: standard output cannot be written: No space left on device\n"


def test_few_open_files_are_refused_before_mpi_starts(tmp_path: Path) -> None:
    message = error_message(
        shell(f"ulimit -n 20; PROGRAM run {SMALL} --run.dir new", tmp_path), "ulimit -n = 20"
    )
    assert "ulimit -n 1024" in message and not (tmp_path / "new").exists()
    soft = shell(f"ulimit -S -n 20; PROGRAM run {SMALL} --run.dir new", tmp_path)
    assert soft.code == 0, "a limit that may be raised is raised"
