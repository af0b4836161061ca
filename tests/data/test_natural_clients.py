"""Data that name the client of every row: the natural partition is proposed, and what is given wins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from support.data_files import random_images, write_h5, write_npz_clients
from support.launcher import Result

OWNERS = np.repeat(np.arange(3), (20, 24, 28))
X, Y = random_images(len(OWNERS), 1, 4, 4), np.arange(len(OWNERS)) % 2


@pytest.fixture(params=["hdf5", "npz", "prepared"])
def flags(request: Any, tmp_path: Path, run_command: Callable[..., Result]) -> tuple[str, ...]:
    """The flags of the same rows as HDF5, npz, and npz prepared as HDF5."""
    path = write_h5(tmp_path / "a.h5", x=X, y=Y, client=OWNERS)
    if request.param == "hdf5":
        return ("--data.source", "hdf5", "--data.path", str(path))
    clients = {k: {"x": X[k == OWNERS], "y": Y[k == OWNERS]} for k in range(3)}
    npz = ("--data.source", "npz", "--data.path", str(write_npz_clients(tmp_path / "n", "train", clients)))
    if request.param == "npz":
        return npz
    run_command("data", "prepare", "b.h5", *npz)
    return ("--data.source", "hdf5", "--data.path", str(tmp_path / "b.h5"))


def clients_of(partition: Path) -> list[list[int]]:
    """Return every client's rows, of all parts."""
    with h5py.File(partition) as file:
        parts = [(file[name]["rows"][()], file[name]["offsets"][()]) for name in ("train", "test")]
    return [
        sorted(row for rows, ends in parts for row in rows[ends[k] : ends[k + 1]].tolist())
        for k in range(len(parts[0][1]) - 1)
    ]


def test_clients_of_the_data_are_the_default(
    run_command: Callable[..., Result], flags: tuple[str, ...], tmp_path: Path
) -> None:
    run_command("data", "partition", "p.h5", *flags)
    assert clients_of(tmp_path / "p.h5") == [np.flatnonzero(k == OWNERS).tolist() for k in range(3)]
    said = run_command(*flags, "--dry").out
    assert "proposed by the data: partition.kind = natural, clients = 3" in said and ": 3 clients" in said


def test_given_partition_wins(
    run_command: Callable[..., Result], flags: tuple[str, ...], tmp_path: Path
) -> None:
    run_command(
        "data", "partition", "p.h5", *flags, "--partition.kind", "iid", "--clients", "4", "--seed", "1"
    )
    sizes = [len(rows) for rows in clients_of(tmp_path / "p.h5")]
    assert sizes == [18] * 4


def test_given_partition_of_a_file_keeps_the_number_of_clients(
    run_command: Callable[..., Result], tmp_path: Path
) -> None:
    path = write_h5(
        tmp_path / "a.h5", x=np.repeat(X, 10, 0), y=np.repeat(Y, 10), client=np.repeat(OWNERS, 10)
    )
    flags = ("--data.source", "hdf5", "--data.path", path, "--dry")
    assert ": 20 clients" in run_command(*flags, "--partition.kind", "dirichlet").out
    assert ": 3 clients" in run_command(*flags, "--partition.kind", "natural").out


def test_parameters_of_another_partition_are_refused(
    assert_refused: Callable[..., str], flags: tuple[str, ...]
) -> None:
    """Without a kind they would be ignored."""
    for name, value, kind in (
        ("alpha", "0.1", "dirichlet"),
        ("classes", "1", "pathological"),
        ("classes_min", "1", "classes"),
        ("balance", "false", "dirichlet_class"),
        ("shards", "3", "shards"),
    ):
        pattern = f"partition.{name} has no effect(.|\n)*set --partition.kind {kind}"
        assert_refused(pattern, *flags, f"--partition.{name}", value)
    assert_refused(
        "data have 3 natural clients(.|\n)*or --partition.kind dirichlet", *flags, "--clients", "4"
    )


def test_file_without_clients_proposes_nothing(run_command: Callable[..., Result], tmp_path: Path) -> None:
    path = write_h5(tmp_path / "a.h5", x=np.repeat(X, 10, 0), y=np.repeat(Y, 10))
    said = run_command("--data.source", "hdf5", "--data.path", path, "--partition.alpha", "5", "--dry").out
    assert ": 20 clients" in said and "proposed" not in said
