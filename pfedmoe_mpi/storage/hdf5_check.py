"""Tests of the HDF5 library for `check`: its version, and whether files and locks work in a folder."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

_NUMBERS = 1000


def version_text() -> str:
    """Return the versions of h5py and HDF5, and whether they were built with MPI, which is not needed."""
    with_mpi = "with MPI" if h5py.get_config().mpi else "without MPI, which is not needed"
    return f"h5py {h5py.__version__} (HDF5 {h5py.version.hdf5_version}, {with_mpi})"


def write_numbers(path: Path) -> None:
    """Write a small file with the locking that this program uses.

    Raises:
        OSError, RuntimeError: from the library.
    """
    with h5py.File(path, "w", locking="best-effort") as file:
        file["x"] = np.arange(_NUMBERS)


def read_numbers(path: Path) -> None:
    """Read and check the file of `write_numbers`.

    Raises:
        ValueError: the file holds other numbers.
        OSError, RuntimeError: from the library.
    """
    with h5py.File(path, "r", locking="best-effort") as file:
        if int(file["x"][()].sum()) != _NUMBERS * (_NUMBERS - 1) // 2:
            raise ValueError("the numbers read differ from the numbers written")


def locks_work(path: Path) -> bool:
    """Return whether the library can lock an existing file."""
    try:
        with h5py.File(path, "r", locking=True):
            return True
    except OSError:
        return False
