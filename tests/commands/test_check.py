"""`check`: one line per finding; FAIL has a remedy and exit code 1."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pfedmoe_mpi import environment
from pfedmoe_mpi.commands.finding import Finding
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
    assert lines.pop() == "all checks passed"
    assert all(line.startswith("ok   ") or (line[:5] == "note " and "; advice: " in line) for line in lines)
    n = max(1, ranks)
    some = "1 rank" if n == 1 else f"{n} ranks"
    expected = [
        "ok   MPI library: ",
        "ok   software, equal on all ranks: pfedmoe_mpi ",
        f"ok   ranks: {some} on 1 host (",
        *(f"ok   rank {rank}: local rank {rank} of {n}, trains on " for rank in range(n)),
        f"ok   MPI sum: 1 to 4,000,000 int64 numbers were added over {some}",
        "ok   signals: each rank sent itself SIGUSR1 and received it",
        "note stopping a run: MPICH's mpirun passes SIGUSR1, ",
        f"ok   folder: {tmp_path} is seen by all ranks, ",
        f"ok   parallel writing: {some} wrote 4 MiB each into one file",
        "ok   rename: a file was replaced 100 times ",
        "ok   hard links: ",
        "ok   HDF5: rank 0 wrote a file, and all ranks read it at once",
    ]
    for text in expected:
        assert sum(line.startswith(text) for line in lines) == 1, (text, lines)
    assert sum(
        line.startswith("note cores: the host of rank 0 has more ranks than cores") for line in lines
    ) == (n > environment.CORES)
    assert not list(tmp_path.iterdir()), "check left something behind"


@pytest.mark.openmpi
def test_check_passes_under_open_mpi(tmp_path: Path) -> None:
    code, lines = check(2, tmp_path, mpi="openmpi")
    assert code == 0 and lines[-1] == "all checks passed", lines
    assert any("added over 2 ranks" in line and "exact" in line for line in lines)
    assert any("Open MPI's mpirun passes SIGUSR1 to the ranks, but SIGTERM ends" in line for line in lines)


@pytest.mark.parametrize("with_slurm", [True, False])
def test_slurm_advice_says_who_is_signalled(tmp_path: Path, with_slurm: bool) -> None:
    """The line tells the two ways apart in words: the script with mpirun, or the ranks with srun."""
    (tmp_path / "bin").mkdir()
    for name in ("sbatch",) if with_slurm else ():
        (tmp_path / "bin" / name).symlink_to("/bin/true")
    python = str(Path(sys.executable).parent)
    _, lines = check(0, tmp_path, env={"PATH": f"{tmp_path}/bin{os.pathsep}{python}"})
    slurm = [line for line in lines if line.startswith("note Slurm: ")]
    assert len(slurm) == with_slurm
    if with_slurm:
        assert "starts mpirun, `#SBATCH --signal=B:USR1@120` signals the script, and a trap" in slurm[0]
        assert "starts srun, `#SBATCH --signal=USR1@120` (without `B:`) signals the ranks" in slurm[0]
        assert "; advice: submit jobs/train.slurm" in slurm[0]


def failed(lines: list[str]) -> str:
    (line,) = [line for line in lines if line.startswith("FAIL ")]
    assert "; remedy: " in line and lines[-1] == "1 check failed"
    return line


@pytest.mark.parametrize("ranks", [1, 2])
def test_check_reports_a_missing_folder(tmp_path: Path, ranks: int) -> None:
    code, lines = check(ranks, tmp_path / "nowhere")
    assert code == 1
    assert f"folder: {tmp_path / 'nowhere'} does not exist" in failed(lines)
    assert f"; remedy: mkdir -p {tmp_path / 'nowhere'}, or name another" in failed(lines)
    assert any("MPI sum" in line for line in lines), "the other findings are still printed"


def test_check_reports_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, lines = check(1, tmp_path / "file")
    assert code == 1
    assert f"folder: {tmp_path / 'file'} is not a folder" in failed(lines)


def test_check_reports_a_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    if os.geteuid() == 0:  # root may write anywhere but where the kernel forbids it
        folder = Path("/sys")
        if not folder.is_dir():
            pytest.skip("no folder that root may not write to")
    code, lines = check(2, folder)
    assert code == 1
    assert "cannot be written to" in failed(lines)


def test_check_reports_a_launcher_of_another_mpi(tmp_path: Path) -> None:
    code, lines = check(0, tmp_path, env={"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"})
    assert code == 1
    assert "each believes it is alone" in failed(lines)


def test_finding_is_one_line() -> None:
    assert str(Finding(True, "works")) == "ok   works"
    assert str(Finding(True, "is slow", "start fewer")) == "note is slow; advice: start fewer"
    assert str(Finding(False, "does not", "fix it")) == "FAIL does not; remedy: fix it"
