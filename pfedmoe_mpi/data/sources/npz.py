"""Per-client folders of PFLlib and HtFLlib: `train/K.npz` and `test/K.npz` with a pickled dict of x and y."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pfedmoe_mpi.data.dataset import MemoryRows, SourceData, check_finite, sample_shape
from pfedmoe_mpi.data.sources.safe_pickle import read_arrays
from pfedmoe_mpi.errors import DataError, UserError

_FREE, _RATIO = 64 << 20, 100  # an archive may unpack to _FREE bytes plus _RATIO times its own length
_LAYOUT = "give train/0.npz, train/1.npz, ... and the same in test/, each with x and y"


def load_npz(root: Path) -> SourceData:
    """Read all clients into memory: client = K, official test part = the files in `test/`.

    Raises:
        DataError: a missing or malformed file, two files of one client, a pickle that holds more than arrays,
            clients of different shapes or dtypes, or NaN.
    """
    parts: list[tuple[np.ndarray, np.ndarray, int, bool]] = []
    train, test = _files(root / "train"), _files(root / "test")
    if not train or set(train) != set(range(len(train))):
        missing = next(number for number in range(len(train) + 1) if number not in train)
        raise DataError(f"{root} has no train/{missing}.npz", _LAYOUT)
    if set(test) - set(train):
        raise DataError(f"{root} has test/{max(set(test) - set(train))}.npz without a train part", _LAYOUT)
    for number, files in ((number, (train, test)) for number in sorted(train)):
        parts += [(*_read_client(part[number]), number, part is test) for part in files if number in part]
    _check_equal_shapes(parts, root)
    sizes = [len(y) for _, y, _, _ in parts]
    return SourceData(
        name=root.resolve().name,
        where=f"npz folder {root}",
        store=MemoryRows(np.concatenate([x for x, _, _, _ in parts])),
        labels=np.concatenate([y for _, y, _, _ in parts]),
        client=np.repeat([number for _, _, number, _ in parts], sizes).astype(np.int64),
        official_test=np.repeat([official for _, _, _, official in parts], sizes) if test else None,
        proposals={"partition.kind": "natural", "clients": len(train)},
    )


def _files(folder: Path) -> dict[int, Path]:
    """Return the files `K.npz` by number K.

    Raises:
        DataError: two files have the same number: 1.npz and 01.npz.
    """
    files: dict[int, Path] = {}
    for path in sorted(folder.glob("*.npz")):
        if path.stem.isdecimal():
            other = files.setdefault(int(path.stem), path)
            if other != path:
                raise DataError(
                    f"{other} and {path} are both client {int(path.stem)}",
                    "remove one of them, or give it the number of another client",
                )
    return files


def _check_equal_shapes(parts: list[tuple[np.ndarray, np.ndarray, int, bool]], root: Path) -> None:
    first = parts[0][0]
    for x, _, number, _ in parts:
        if (x.shape[1:], x.dtype) != (first.shape[1:], first.dtype):
            raise DataError(
                f"{root}: x of client {number} is {x.dtype} {x.shape[1:]}, "
                f"of client 0 {first.dtype} {first.shape[1:]}",
                "give all clients samples of one shape and dtype",
            )


def _read_client(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return x (n, *shape) uint8 or float32 and y (n,) of one file."""
    arrays = _read_archive(path)
    if "x" not in arrays or "y" not in arrays:
        raise DataError(f"{path} has no arrays x and y; it has {', '.join(arrays) or 'nothing'}", _LAYOUT)
    x, y = arrays["x"], arrays["y"]
    shape = sample_shape(x.shape, str(path))
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise DataError(f"x of {path} is {x.dtype}", "store uint8 (0 to 255) or float32")
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
        raise DataError(
            f"{path} has {len(x)} samples, but labels of {y.dtype} {y.shape}",
            f"give one integer label per sample, ({len(x)},)",
        )
    with np.errstate(over="ignore"):  # values too large for float32 become infinite, which is refused
        x = x.astype(np.uint8 if x.dtype == np.uint8 else np.float32, copy=False).reshape(-1, *shape)
    check_finite(x, np.arange(len(x)), str(path))
    return x, y.astype(np.int64)


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an archive by name: its members, or the entries of its one pickled dict."""
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
            if claimed > _FREE + _RATIO * path.stat().st_size:
                problem = f"{path} claims {claimed:,} bytes, at least {_RATIO} times its own length"
                raise DataError(problem, "write it again with numpy.savez, which does not compress")
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            members = {name: archive.read(full) for name, full in zip(names, archive.namelist(), strict=True)}
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
        raise DataError(f"{path} cannot be read as npz: {error}", "copy the file again") from error
    _check_distinct(names, path)
    arrays: list[tuple[str, np.ndarray]] = []
    for name, raw in members.items():
        arrays += _read_member(name, raw, path).items()
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
