"""An exception in any phase ends the job within seconds, with one traceback and no partial file."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from pfedmoe_mpi import checkpoint
from support.fault_injection import PHASES, PREPARED, ROOT_PHASES
from support.launcher import SMALL_RUN
from support.mpi_job import run_module

RANKS = 3
FLAGS = (*SMALL_RUN, "--clients", "6", "--rounds", "3", "--run.checkpoint_every", "1")
NAMED = {
    "preparation": r"preparation of client \d",
    "training": r"client \d, round 1",
    "contribution": r"client \d, round 1",
    "evaluation": r"evaluation of client \d, round 1",
}
AFTER_ROUND_1 = {"sum", "update", "record", "layout", "write", "seal"}


def fails(tmp_path: Path, rank: int | str, phase: str, mpi: str, action: str = "raise") -> None:
    """Run with the fault and check the job's exit code and output."""
    run = tmp_path / "run"
    fault = ("fault_injection", action, str(rank), phase)
    flags = (*FLAGS, *PREPARED) if phase == "preparation" else FLAGS
    ended = run_module(*fault, *flags, "--run.dir", str(run), ranks=RANKS, mpi=mpi)
    seconds = time.time() - float(re.findall(r"fault at ([\d.]+)", ended.output)[0])
    text = ended.output
    assert ended.code not in {0, 2, 75}, text
    assert text.count("Traceback (most recent call last)") == 1, text
    assert text.count(f"Injected: {phase}") == 1, text
    speaker = re.search(r"^(?:\[.*\])?rank (\d+): Traceback", text, re.MULTILINE)
    assert speaker and (rank == "all" or speaker[1] == str(rank)), text
    assert re.search(NAMED.get(phase, "round 2" if phase in AFTER_ROUND_1 else ""), text), text
    assert ended.left == 0, "processes were left behind"
    print(f"{phase} on rank {rank} under {mpi}: over {seconds:.1f} s after the fault")
    assert seconds < 10
    for path in checkpoint.newest_first(run / "checkpoints"):
        checkpoint.verify(path)


def cases() -> list[tuple[str, int]]:
    """Return (phase, rank): the ranks in turn, rank 0 where only it does the work."""
    return [(phase, 0 if phase in ROOT_PHASES else number % RANKS) for number, phase in enumerate(PHASES)]


@pytest.mark.parametrize(("phase", "rank"), cases())
def test_exception_ends_the_job(tmp_path: Path, phase: str, rank: int) -> None:
    fails(tmp_path, rank, phase, "mpich")


@pytest.mark.openmpi
@pytest.mark.parametrize(("phase", "rank"), cases()[3::3])
def test_exception_ends_the_job_under_open_mpi(tmp_path: Path, phase: str, rank: int) -> None:
    fails(tmp_path, rank, phase, "openmpi")


@pytest.mark.parametrize("phase", ["preparation", "training", "evaluation"])
def test_error_with_a_message_of_one_client_ends_the_job(tmp_path: Path, phase: str) -> None:
    """The others, who wait for it, would print a message of their own after the time-out of ten minutes."""
    fails(tmp_path, 1, phase, "mpich", action="refuse")


def test_ranks_failing_together_print_one_traceback(tmp_path: Path) -> None:
    fails(tmp_path, "all", "update", "mpich")


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mpi", ["mpich", pytest.param("openmpi", marks=pytest.mark.openmpi)])
@pytest.mark.parametrize("rank", [0, 1, 2, "all"])
@pytest.mark.parametrize("phase", list(PHASES))
def test_exception_at_every_phase_ends_the_job(tmp_path: Path, phase: str, rank: int | str, mpi: str) -> None:
    if phase in ROOT_PHASES and rank not in {0, "all"}:
        pytest.skip("the root alone does this")
    fails(tmp_path, rank, phase, mpi)
