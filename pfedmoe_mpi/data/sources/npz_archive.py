"""npz archives that anybody could have written: arrays alone, of a plausible size, each name once."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pfedmoe_mpi.data.sources.safe_pickle import read_arrays
from pfedmoe_mpi.errors import DataError, UserError

_FREE, _RATIO = 64 << 20, 100  # an archive may unpack to _FREE bytes plus _RATIO times its own length


def read_archive(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, np.ndarray]:
    """Return the arrays of an archive by name: its members, or the entries of its one pickled dict.

    Args:
        prefixes: the beginnings of the names that are wanted; only these members are read.

    Raises:
        DataError: the file is damaged, claims to unpack to far more than its length, has two arrays of one
            name, or holds more than arrays.
    """
    arrays: list[tuple[str, np.ndarray]] = []
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
            if claimed > _FREE + _RATIO * path.stat().st_size:
                problem = f"{path} claims {claimed:,} bytes, at least {_RATIO} times its own length"
                raise DataError(problem, "write it again with numpy.savez, which does not compress")
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            _check_distinct(names, path)
            for name, full in zip(names, archive.namelist(), strict=True):
                if name.startswith(prefixes):
                    arrays += _read_member(name, archive.read(full), path).items()
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
        raise DataError(f"{path} cannot be read as npz: {error}", "copy the file again") from error
    _check_distinct([name for name, _ in arrays], path)
    return dict(arrays)


def _check_distinct(names: list[str], path: Path) -> None:
    """Refuse an archive with two arrays of one name, one of which would be lost."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path} has {twice[0]!a} twice", "write it again with numpy.savez")


def _read_member(name: str, raw: bytes, path: Path) -> dict[str, np.ndarray]:
    """Return a member's array by its name, or the arrays of its pickled dict by theirs."""
    stream = io.BytesIO(raw)
    try:
        shape, dtype = _read_header(stream)
        if dtype.hasobject:
            return read_arrays(stream.read(), str(path))
        if math.prod(shape) * dtype.itemsize != len(raw) - stream.tell():
            raise ValueError(f"{dtype} {shape} in {len(raw) - stream.tell()} bytes")
        stream.seek(0)
        return {name: np.lib.format.read_array(stream, allow_pickle=False)}
    except UserError:
        raise
    except Exception as error:  # a damaged header may raise anything
        raise DataError(
            f"{name} of {path} cannot be read as an array: {error}", "copy the file again"
        ) from error


def _read_header(stream: io.BytesIO) -> tuple[tuple[int, ...], Any]:
    """Return (shape, dtype) of a `.npy` file, and leave the stream at its data."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype
