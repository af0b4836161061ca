"""Waiting, summing, agreeing and ending under MPI; what each rank does is in comm_driver.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from comm_driver import HARMLESS, HERE, Ended, mpirun, openmpi

from pfedmoe_mpi import comm

RUNTIMES = [
    "mpich",
    pytest.param(
        "openmpi",
        marks=[
            pytest.mark.openmpi,
            pytest.mark.skipif(not openmpi(), reason="no Open MPI beside the program"),
        ],
    ),
]


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def harmless(runtime: str) -> Ended:
    """All checks that leave the job alive, in one job."""
    return mpirun("harmless", limit=120, runtime=runtime)


@pytest.mark.parametrize("check", HARMLESS)
def test_four_ranks(harmless: Ended, check: str) -> None:
    assert f"pass {check}\n" in harmless.output, harmless.output


def test_a_job_that_is_done_ends_quietly(harmless: Ended) -> None:
    assert (harmless.code, harmless.left) == (0, 0), harmless.output
    assert "Traceback" not in harmless.output


@pytest.mark.parametrize(
    ("late", "named"), [(["2"], "2"), (["1", "3"], "1, 3"), (["0"], "0")], ids=["one", "two", "root"]
)
def test_who_does_not_come_is_named_in_bounded_time(runtime: str, late: list[str], named: str) -> None:
    ended = mpirun("missing", *late, runtime=runtime)
    assert ended.code != 0 and ended.left == 0
    assert f"no sign for 1 s at 'sum of round 7' of rank {named}\n" in ended.output
    assert ended.output.count("no sign") == 1, "said once"
    assert ended.seconds < 20


def test_an_exchange_that_does_not_end_ends_the_job(runtime: str) -> None:
    ended = mpirun("unfinished", runtime=runtime)
    assert ended.code != 0 and ended.left == 0 and ended.seconds < 20
    assert "the exchange 'sum of round 7' did not end within 1 s" in ended.output


def test_a_bug_on_one_rank_ends_the_job_with_its_traceback_once(runtime: str) -> None:
    ended = mpirun("fault", runtime=runtime)
    assert ended.code != 0 and ended.left == 0 and ended.seconds < 20
    assert ended.output.count("Traceback") == ended.output.count("ValueError: a bug on rank two") == 1
    assert "rank 2: Traceback" in ended.output


def test_a_bug_ends_the_job_even_if_nothing_can_be_printed(runtime: str) -> None:
    ended = mpirun("unheard", runtime=runtime)
    assert ended.code != 0 and ended.left == 0 and ended.seconds < 20


def test_all_leave_together_with_their_code(runtime: str, tmp_path: Path) -> None:
    ended = mpirun("code", str(tmp_path), runtime=runtime)
    assert (ended.code, ended.left) == (75, 0), ended.output
    assert (tmp_path / "late").read_text() == "written"


def test_a_stop_at_the_end_is_no_fault(runtime: str) -> None:
    ended = mpirun("late_stop", runtime=runtime)
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
def test_how_many_ranks_the_launcher_started(environment: dict[str, str], size: int) -> None:
    assert comm.launched_size(environment) == size


def test_the_rank_is_known_before_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert comm.launched_rank() == 0
    monkeypatch.setenv("SLURM_PROCID", "5")
    assert comm.launched_rank() == 5
    monkeypatch.setenv("PMI_RANK", "2")
    assert comm.launched_rank() == 2


def _alone(environment: dict[str, str], singleton: bool) -> subprocess.CompletedProcess[str]:
    script = (
        "from pfedmoe_mpi import comm\n"
        "from pfedmoe_mpi.errors import LaunchError\n"
        f"try: print('size', comm.start({singleton}).size)\n"
        "except LaunchError as error: print('refused', error)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI", "SLURM"))}
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**clean, **environment},
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_ranks_that_each_believe_to_be_alone_are_refused() -> None:
    refused = _alone({"SLURM_STEP_NUM_TASKS": "16"}, False).stdout
    assert refused.startswith("refused the launcher started 16 ranks") and "remedy" in refused
    assert _alone({"SLURM_STEP_NUM_TASKS": "16"}, True).stdout == "size 1\n"
    assert _alone({}, False).stdout == "size 1\n"
