"""Waiting, summing, agreeing and ending under MPI; what each rank does is in `support/comm_checks.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pfedmoe_mpi.environment import launched_rank, launched_size
from support.comm_checks import HARMLESS
from support.launcher import openmpi_folder
from support.mpi_job import JobResult, run_module
from support.paths import ROOT


@pytest.fixture(scope="module", params=["mpich", pytest.param("openmpi", marks=pytest.mark.openmpi)])
def mpi(request: pytest.FixtureRequest) -> str:
    if request.param == "openmpi":
        openmpi_folder()  # or skip
    return str(request.param)


@pytest.fixture(scope="module")
def harmless(mpi: str) -> JobResult:
    """All checks that leave the job alive, in one job."""
    return run_module("comm_checks", "harmless", mpi=mpi)


@pytest.mark.parametrize("check", HARMLESS)
def test_comm_check_passes_on_four_ranks(harmless: JobResult, check: str) -> None:
    assert f"pass {check}\n" in harmless.output, harmless.output


def test_finished_job_ends_quietly(harmless: JobResult) -> None:
    assert (harmless.code, harmless.left) == (0, 0), harmless.output
    assert "Traceback" not in harmless.output


@pytest.mark.parametrize(
    ("late", "named"),
    [(["2"], "rank 2"), (["1", "3"], "ranks 1, 3"), (["0"], "rank 0")],
    ids=["one", "two", "root"],
)
def test_missing_ranks_are_named_in_bounded_time(mpi: str, late: list[str], named: str) -> None:
    ended = run_module("comm_checks", "missing", *late, mpi=mpi)
    assert ended.code != 0 and ended.left == 0 and "killed" not in ended.output, ended.output
    assert f": {named} did not reach 'sum of round 7' within 1 s (run.timeout)\n" in ended.output
    assert ended.output.count("did not reach") == 1, "said once"


def test_unfinished_exchange_ends_the_job(mpi: str) -> None:
    ended = run_module("comm_checks", "unfinished", mpi=mpi)
    assert ended.code != 0 and ended.left == 0 and "killed" not in ended.output, ended.output
    assert "reached 'sum of round 7', but the exchange did not end within 1 s" in ended.output


def test_exception_on_one_rank_ends_the_job_with_one_traceback(mpi: str) -> None:
    ended = run_module("comm_checks", "fault", mpi=mpi)
    assert ended.code != 0 and ended.left == 0 and "killed" not in ended.output, ended.output
    assert ended.output.count("Traceback") == ended.output.count("ValueError: a bug on rank two") == 1
    assert "rank 2: Traceback" in ended.output


def test_exception_ends_the_job_even_without_output(mpi: str) -> None:
    ended = run_module("comm_checks", "unheard", mpi=mpi)
    assert ended.code != 0 and ended.left == 0 and "killed" not in ended.output, ended.output


def test_all_ranks_exit_together_with_their_code(mpi: str, tmp_path: Path) -> None:
    ended = run_module("comm_checks", "code", str(tmp_path), mpi=mpi)
    assert (ended.code, ended.left) == (75, 0), ended.output
    assert (tmp_path / "late").read_text() == "written"


def test_stop_request_at_the_end_is_accepted(mpi: str) -> None:
    ended = run_module("comm_checks", "late_stop", mpi=mpi)
    assert (ended.code, ended.left) == (0, 0), ended.output


# Launchers


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({}, 1),
        ({"PMI_SIZE": "4"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
        ({"SLURM_STEP_NUM_TASKS": "8"}, 8),
        ({"PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "8"}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "8"}, 2),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": ""}, 1),
    ],
)
def test_launched_size_is_read_from_the_environment(environment: dict[str, str], size: int) -> None:
    assert launched_size(environment) == size


def test_launched_rank_is_read_before_mpi_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert launched_rank() == 0
    monkeypatch.setenv("SLURM_PROCID", "5")
    assert launched_rank() == 5
    monkeypatch.setenv("PMI_RANK", "2")
    assert launched_rank() == 2


def _alone(environment: dict[str, str], singleton: bool) -> subprocess.CompletedProcess[str]:
    script = (
        "from pfedmoe_mpi.mpi import launch\n"
        "from pfedmoe_mpi.errors import LaunchError\n"
        f"try: print('size', launch.start({singleton}).size)\n"
        "except LaunchError as error: print('refused', error)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI", "SLURM"))}
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**clean, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_disconnected_ranks_are_refused() -> None:
    refused = _alone({"SLURM_STEP_NUM_TASKS": "16"}, False).stdout
    assert refused.startswith("refused the launcher started 16 ranks") and "remedy" in refused
    assert _alone({"SLURM_STEP_NUM_TASKS": "16"}, True).stdout == "size 1\n"
    assert _alone({}, False).stdout == "size 1\n"
