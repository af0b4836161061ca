"""Launchers that do not match, and mistakes that several ranks meet: one message from one rank."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from pfedmoe_mpi.core import seeds
from support.launcher import digest, flip, program, told

# Launchers


@pytest.mark.parametrize(
    "variables",
    [
        {"PMI_SIZE": "4", "PMI_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"},
    ],
)
def test_ranks_that_believe_they_are_alone(
    small: tuple[str, ...], tmp_path: Path, variables: dict[str, str]
) -> None:
    result = program(0, *small, cwd=tmp_path, env=variables)
    message = told(result, "started 4 ranks, but each believes it is alone")
    assert "--mpi=pmi2" in message and "--run.singleton true" in message
    assert list(tmp_path.iterdir()) == []


STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}


def test_only_the_first_of_them_speaks(small: tuple[str, ...], tmp_path: Path) -> None:
    result = program(0, *small, cwd=tmp_path, env={**STEP, "SLURM_PROCID": "3"})
    assert (result.code, result.out + result.err) == (2, "")
    result = program(0, "--rouns", "3", cwd=tmp_path, env={**STEP, "SLURM_PROCID": "3"})
    assert (result.code, result.out + result.err) == (2, "")
    told(program(0, "--rouns", "3", cwd=tmp_path, env=STEP), "no flag --rouns")


def test_restarts_are_refused_too_unless_one_rank_is_meant(run: Path, tmp_path: Path) -> None:
    told(program(0, "restart", str(run), cwd=tmp_path, env=STEP), "each believes it is alone")
    meant = program(0, "restart", str(run), "--run.singleton", "true", cwd=tmp_path, env=STEP)
    assert meant.code == 0 and "the run is finished" in meant.out, meant.err


def test_one_rank_may_be_meant(small: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    dry = (*small, "--dry", "true")
    meant = program(0, *dry, "--run.singleton", "true", cwd=tmp_path, env=STEP)
    assert meant.code == 0, meant.err
    inherited = program(1, *dry, cwd=tmp_path, env=STEP)
    assert inherited.code == 0, "PMI_SIZE alone decides: " + inherited.err
    evaluated = program(0, "evaluate", str(run / "checkpoints" / "best.h5"), cwd=tmp_path, env=STEP)
    assert evaluated.code == 0, "only run and restart are refused: " + evaluated.err


BOTH = pytest.mark.parametrize("mpi", ["mpich", pytest.param("openmpi", marks=pytest.mark.openmpi)])


@BOTH
def test_one_message_of_several_ranks(small: tuple[str, ...], run: Path, tmp_path: Path, mpi: str) -> None:
    """Before MPI is started, after it, and for what every rank checks a part of."""
    damaged = run / "checkpoints" / "round-000003.h5"
    flip(damaged, damaged.stat().st_size - 1)
    before = digest(tmp_path), sorted(tmp_path.rglob("*"))
    for pattern, arguments in (
        ("no configuration file", ("run", "none.toml")),
        ("cnn1 cannot take 3x8x8", (*small, "--model.pool", "cnn1", "--run.dir", "new")),
        ("is damaged", ("restart", str(damaged))),
    ):
        told(program(2, *arguments, cwd=tmp_path, mpi=mpi), pattern)
    assert (digest(tmp_path), sorted(tmp_path.rglob("*"))) == before


def on_rank(number: int, code: str, folder: Path) -> dict[str, str]:
    """The environment in which that rank runs `code` before the program."""
    (folder / "site").mkdir()
    names = "os.environ.get('PMI_RANK'), os.environ.get('OMPI_COMM_WORLD_RANK')"
    text = f"import os\nif '{number}' in ({names}):\n    {code}\n"
    (folder / "site" / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])}


@BOTH
def test_the_message_survives_a_first_rank_that_is_late(tmp_path: Path, mpi: str) -> None:
    """Open MPI's launcher ends all ranks at the first non-zero exit."""
    late = on_rank(0, "import time; time.sleep(2)", tmp_path)
    told(program(2, "--rouns", "3", cwd=tmp_path, mpi=mpi, env=late), "no flag --rouns")


def test_a_configuration_that_one_host_does_not_have(small: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("rounds = 1\n")
    lost = on_rank(1, "os.chdir('/')", tmp_path)
    result = program(2, "c.toml", *small, "--run.dir", str(tmp_path / "new"), cwd=tmp_path, env=lost)
    told(result, "no configuration file c.toml")
    assert not (tmp_path / "new").exists()


def test_data_that_one_host_does_not_have(small: tuple[str, ...], tmp_path: Path) -> None:
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["x"], file["y"] = np.zeros((200, 3, 8, 8), np.uint8), np.arange(200) % 10
    lost = on_rank(1, f"import h5py; h5py.File = lambda *_, **__: open('{tmp_path}/none')", tmp_path)
    flags = ("--data.source", "hdf5", "--data.path", "d.h5", "--run.dir", "new")
    told(program(2, *small, *flags, cwd=tmp_path, env=lost), "d.h5 cannot be opened")
    assert not (tmp_path / "new").exists()


def test_a_damaged_row_that_only_the_server_reads(small: tuple[str, ...], tmp_path: Path) -> None:
    """The other rank hears of it too, and does not wait for ever."""
    kept = seeds.numpy_generator(0, "reserve").permutation(200)[0]
    with h5py.File(tmp_path / "d.h5", "w") as file:
        x = file.create_dataset("x", (200, 3, 8, 8), "u1", chunks=(1, 3, 8, 8), fletcher32=True)
        x[()], file["y"] = 7, np.arange(200) % 10
        place = x.id.get_chunk_info_by_coord((int(kept), 0, 0, 0)).byte_offset
    flip(tmp_path / "d.h5", place)
    flags = ("--data.source", "hdf5", "--data.path", "d.h5", "--algorithm", "fedjets", "--run.dir", "new")
    flags = (*flags, "--model.pool", "mlp5")
    told(program(2, *small, *flags, cwd=tmp_path, timeout=60), f"rows {kept} to {kept + 1} cannot be read")
    assert not (tmp_path / "new").exists()


def test_what_a_rank_without_a_client_would_not_meet(small: tuple[str, ...], tmp_path: Path) -> None:
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["x"], file["y"] = np.zeros((200, 5), np.float32), np.arange(200) % 2
    flags = ("--data.source", "hdf5", "--data.path", "d.h5", "--clients", "2", "--gate.input", "pooled")
    flags = (*flags, "--data.size", "0")
    told(program(3, *small, *flags, cwd=tmp_path, timeout=60), "gate.input pooled needs images")
