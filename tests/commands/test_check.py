"""`check`: one line per finding; FAIL has a remedy and exit code 1."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pfedmoe_mpi.commands.check import Finding
from support.launcher import run_program


def check(
    ranks: int, folder: Path, env: dict[str, str] | None = None, mpi: str = "mpich"
) -> tuple[int, list[str]]:
    """Return (exit code, lines) of `check FOLDER`; 0 ranks run without mpirun."""
    result = run_program(ranks, "check", str(folder), cwd=folder.parent, env=env, mpi=mpi)
    assert not result.err
    return result.code, result.out.splitlines()


@pytest.mark.parametrize("ranks", [0, 1, 2, 4])
def test_check_passes_on_a_good_cluster(tmp_path: Path, ranks: int) -> None:
    code, lines = check(ranks, tmp_path)
    assert code == 0, lines
    assert all(line.startswith("ok   ") for line in lines), lines
    n = max(1, ranks)
    expected = [
        "mpi4py",
        "h5py",
        f"{n} rank(s) on 1 host(s)",
        *(f"rank {rank}: local rank {rank} of {n}" for rank in range(n)),
        f"integer sum over {n} rank(s) exact",
        "SIGUSR1 is handled while waiting",
        f"one file written by {n} rank(s)",
        "rename is atomic",
        "hard links",
        "HDF5 writes and reads",
    ]
    for text in expected:
        assert sum(text in line for line in lines) == 1, (text, lines)
    assert not list(tmp_path.iterdir()), "check left something behind"


@pytest.mark.openmpi
def test_check_passes_under_open_mpi(tmp_path: Path) -> None:
    code, lines = check(2, tmp_path, mpi="openmpi")
    assert code == 0 and all(line.startswith("ok   ") for line in lines), lines
    assert any("integer sum over 2 rank(s) exact" in line for line in lines)
    assert any("Open MPI's mpirun forwards it, but SIGTERM ends the job at once" in line for line in lines)


def failed(lines: list[str]) -> str:
    (line,) = [line for line in lines if line.startswith("FAIL ")]
    assert "; remedy: " in line
    return line


@pytest.mark.parametrize("ranks", [1, 2])
def test_check_reports_a_missing_folder(tmp_path: Path, ranks: int) -> None:
    code, lines = check(ranks, tmp_path / "nowhere")
    assert code == 1
    assert "no such folder" in failed(lines)
    assert any("integer sum" in line for line in lines), "the other findings are still printed"


def test_check_reports_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, lines = check(1, tmp_path / "file")
    assert code == 1
    assert "no such folder" in failed(lines)


def test_check_reports_a_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    if os.geteuid() == 0:  # root may write anywhere but where the kernel forbids it
        folder = Path("/sys")
        if not folder.is_dir():
            pytest.skip("no folder that root may not write to")
    code, lines = check(2, folder)
    assert code == 1
    assert "no file can be written there" in failed(lines)


def test_check_reports_a_launcher_of_another_mpi(tmp_path: Path) -> None:
    code, lines = check(0, tmp_path, env={"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"})
    assert code == 1
    assert "each believes it is alone" in failed(lines)


def test_finding_is_one_line() -> None:
    assert str(Finding(True, "works")) == "ok   works"
    assert str(Finding(False, "does not", "fix it")) == "FAIL does not; remedy: fix it"
