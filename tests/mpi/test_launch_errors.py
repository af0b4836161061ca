"""Mismatched launchers, and errors on several ranks: one message from one rank."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from pfedmoe_mpi.core import seeds
from support.files import flip_bit, path_digest
from support.launcher import error_message, run_program

# Launchers


@pytest.mark.parametrize(
    "variables",
    [
        {"PMI_SIZE": "4", "PMI_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"},
    ],
)
def test_disconnected_ranks_are_refused_with_one_message(
    small_run: tuple[str, ...], tmp_path: Path, variables: dict[str, str]
) -> None:
    result = run_program(0, *small_run, cwd=tmp_path, env=variables)
    message = error_message(result, "started 4 ranks, but each believes it is alone")
    assert "--mpi=pmi2" in message and "--run.singleton true" in message
    assert list(tmp_path.iterdir()) == []


STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}


def test_only_the_first_disconnected_rank_prints(small_run: tuple[str, ...], tmp_path: Path) -> None:
    result = run_program(0, *small_run, cwd=tmp_path, env={**STEP, "SLURM_PROCID": "3"})
    assert (result.code, result.out + result.err) == (2, "")
    result = run_program(0, "--rouns", "3", cwd=tmp_path, env={**STEP, "SLURM_PROCID": "3"})
    assert (result.code, result.out + result.err) == (2, "")
    error_message(run_program(0, "--rouns", "3", cwd=tmp_path, env=STEP), "no flag --rouns")


def test_disconnected_restarts_are_refused(run: Path, tmp_path: Path) -> None:
    error_message(run_program(0, "restart", str(run), cwd=tmp_path, env=STEP), "each believes it is alone")
    meant = run_program(0, "restart", str(run), "--run.singleton", "true", cwd=tmp_path, env=STEP)
    assert meant.code == 0 and "the run is finished" in meant.out, meant.err


def test_single_rank_can_be_requested(small_run: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    dry = (*small_run, "--dry", "true")
    meant = run_program(0, *dry, "--run.singleton", "true", cwd=tmp_path, env=STEP)
    assert meant.code == 0, meant.err
    inherited = run_program(1, *dry, cwd=tmp_path, env=STEP)
    assert inherited.code == 0, "PMI_SIZE alone decides: " + inherited.err
    evaluated = run_program(0, "evaluate", str(run / "checkpoints" / "best.h5"), cwd=tmp_path, env=STEP)
    assert evaluated.code == 0, "only run and restart are refused: " + evaluated.err


BOTH = pytest.mark.parametrize("mpi", ["mpich", pytest.param("openmpi", marks=pytest.mark.openmpi)])


@BOTH
def test_shared_error_is_one_message(small_run: tuple[str, ...], run: Path, tmp_path: Path, mpi: str) -> None:
    """The error may occur before MPI starts, after it, and in a check that all ranks share."""
    damaged = run / "checkpoints" / "round-000003.h5"
    flip_bit(damaged, damaged.stat().st_size - 1)
    before = path_digest(tmp_path), sorted(tmp_path.rglob("*"))
    for pattern, arguments in (
        ("no configuration file", ("run", "none.toml")),
        ("cnn1 cannot take 3x8x8", (*small_run, "--model.pool", "cnn1", "--run.dir", "new")),
        ("is damaged", ("restart", str(damaged))),
    ):
        error_message(run_program(2, *arguments, cwd=tmp_path, mpi=mpi), pattern)
    assert (path_digest(tmp_path), sorted(tmp_path.rglob("*"))) == before


def on_rank(number: int, code: str, folder: Path) -> dict[str, str]:
    """Return the environment in which that rank runs `code` before the program."""
    (folder / "site").mkdir()
    names = "os.environ.get('PMI_RANK'), os.environ.get('OMPI_COMM_WORLD_RANK')"
    text = f"import os\nif '{number}' in ({names}):\n    {code}\n"
    (folder / "site" / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])}


@BOTH
def test_message_survives_a_late_first_rank(tmp_path: Path, mpi: str) -> None:
    """Open MPI's launcher ends all ranks at the first non-zero exit."""
    late = on_rank(0, "import time; time.sleep(2)", tmp_path)
    error_message(run_program(2, "--rouns", "3", cwd=tmp_path, mpi=mpi, env=late), "no flag --rouns")


def test_configuration_missing_on_one_host_is_reported(small_run: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("rounds = 1\n")
    lost = on_rank(1, "os.chdir('/')", tmp_path)
    result = run_program(2, "c.toml", *small_run, "--run.dir", str(tmp_path / "new"), cwd=tmp_path, env=lost)
    error_message(result, "no configuration file c.toml")
    assert not (tmp_path / "new").exists()


def test_data_missing_on_one_host_are_reported(small_run: tuple[str, ...], tmp_path: Path) -> None:
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["x"], file["y"] = np.zeros((200, 3, 8, 8), np.uint8), np.arange(200) % 10
    lost = on_rank(1, f"import h5py; h5py.File = lambda *_, **__: open('{tmp_path}/none')", tmp_path)
    flags = ("--data.source", "hdf5", "--data.path", "d.h5", "--run.dir", "new")
    error_message(run_program(2, *small_run, *flags, cwd=tmp_path, env=lost), "d.h5 cannot be opened")
    assert not (tmp_path / "new").exists()


def test_other_data_on_one_host_are_refused(small_run: tuple[str, ...], tmp_path: Path) -> None:
    """Rank 1 opens a copy of the file in which one label differs."""
    for name in ("d.h5", "e.h5"):
        with h5py.File(tmp_path / name, "w") as file:
            labels = np.arange(200) % 10
            labels[7] = 7 if name == "d.h5" else 8
            file["x"], file["y"] = np.zeros((200, 3, 8, 8), np.uint8), labels
    redirect = "str(path).replace('d.h5', 'e.h5')"
    other = f"import h5py; F = h5py.File; h5py.File = lambda path, *a, **k: F({redirect}, *a, **k)"
    flags = ("--data.source", "hdf5", "--data.path", "d.h5", "--run.dir", "new")
    result = run_program(2, *small_run, *flags, cwd=tmp_path, env=on_rank(1, other, tmp_path))
    error_message(result, r"data.path = .*d\.h5 is another file for rank 1 than for rank 0")
    assert not (tmp_path / "new").exists()


def test_damaged_row_of_the_server_is_reported_on_all_ranks(
    small_run: tuple[str, ...], tmp_path: Path
) -> None:
    """The other rank gets the error too, and does not wait for ever."""
    kept = seeds.numpy_generator(0, "reserve").permutation(200)[0]
    with h5py.File(tmp_path / "d.h5", "w") as file:
        x = file.create_dataset("x", (200, 3, 8, 8), "u1", chunks=(1, 3, 8, 8), fletcher32=True)
        x[()], file["y"] = 7, np.arange(200) % 10
        place = x.id.get_chunk_info_by_coord((int(kept), 0, 0, 0)).byte_offset
    flip_bit(tmp_path / "d.h5", place)
    flags = ("--data.source", "hdf5", "--data.path", "d.h5", "--algorithm", "fedjets", "--run.dir", "new")
    flags = (*flags, "--model.pool", "mlp5")
    error_message(
        run_program(2, *small_run, *flags, cwd=tmp_path, timeout=60),
        f"rows {kept} to {kept + 1} cannot be read",
    )
    assert not (tmp_path / "new").exists()


def test_idle_rank_reports_the_same_error(small_run: tuple[str, ...], tmp_path: Path) -> None:
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["x"], file["y"] = np.zeros((200, 5), np.float32), np.arange(200) % 2
    flags = ("--data.source", "hdf5", "--data.path", "d.h5", "--clients", "2", "--gate.input", "pooled")
    flags = (*flags, "--data.size", "0")
    error_message(
        run_program(3, *small_run, *flags, cwd=tmp_path, timeout=60), "gate.input = pooled needs images"
    )


def test_relative_run_folder_is_that_of_rank_0(run: Path, tmp_path: Path) -> None:
    """The other rank is in another folder, where it finds no run and writes nothing."""
    (tmp_path / "other").mkdir()
    shutil.rmtree(run / "log")
    lost = on_rank(1, f"os.chdir('{tmp_path}/other')", tmp_path)
    result = run_program(2, "restart", "run", "--rounds", "4", cwd=tmp_path, env=lost)
    assert result.code == 0, result.err
    assert sorted(path.name for path in (run / "log").iterdir()) == ["rank-0000.txt", "rank-0001.txt"]
    evaluated = run_program(2, "evaluate", "run/checkpoints/best.h5", cwd=tmp_path, env=lost)
    assert evaluated.code == 0, evaluated.err
    assert not list((tmp_path / "other").iterdir())
