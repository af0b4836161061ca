"""HDF5 files: `x`, `y`, optionally `client`, `official_test`, `class_names`; rows are read when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi.data.dataset import Loaded, check_clients, check_finite, sample_shape
from pfedmoe_mpi.errors import DataError

_SPAN = 16 << 20  # bytes read at once
_BLOCK = 64 << 10  # bytes of a block where the file has no chunks: reading a gap this short beats a seek


class StoredRows:
    """Rows of an open HDF5 file; every rank opens the file itself and reads only what it asks for."""

    distributed = True

    def __init__(self, file: Any, x: Any, where: str) -> None:
        self.shape = sample_shape(x.shape, where)
        self.dtype = np.dtype(np.uint8 if x.dtype == np.uint8 else np.float32)
        self._file, self._x, self._where = file, x, where
        row_bytes = max(1, x.dtype.itemsize * int(np.prod(self.shape)))
        self._block = x.chunks[0] if x.chunks else max(1, _BLOCK // row_bytes)
        self._most = max(1, _SPAN // (row_bytes * self._block))  # blocks in one span

    def read(self, index: np.ndarray) -> np.ndarray:
        """Rows in the order asked, through spans of whole blocks, each read once."""
        out = np.empty((len(index), *self.shape), self.dtype)
        order = np.argsort(index, kind="stable")
        asked = index[order]
        assert not len(asked) or 0 <= asked[0] <= asked[-1] < len(self._x), "row numbers out of range"
        for first, last in self._spans(asked):
            low, high = np.searchsorted(asked, (first, last))
            rows = asked[low:high]
            picked = self._span(first, last)[rows - first]
            check_finite(picked, rows, self._where)
            out[order[low:high]] = picked
        return out

    def check(self) -> None:
        """Refuse a file with a NaN or an infinity anywhere, a span at a time."""
        step = self._block * self._most
        for first in range(0, len(self._x) if self.dtype != np.uint8 else 0, step):
            last = min(first + step, len(self._x))
            check_finite(self._span(first, last), np.arange(first, last), self._where)

    def close(self) -> None:
        self._file.close()

    def _spans(self, asked: np.ndarray) -> Iterator[tuple[int, int]]:
        blocks = np.unique(asked // self._block)
        for run in np.split(blocks, np.flatnonzero(np.diff(blocks) != 1) + 1):
            for start in range(0, len(run), self._most):
                part = run[start : start + self._most]
                yield int(part[0]) * self._block, min((int(part[-1]) + 1) * self._block, len(self._x))

    def _span(self, first: int, last: int) -> np.ndarray:
        try:
            raw = self._x[first:last]
        except OSError as error:
            raise DataError(
                f"{self._where}: rows {first} to {last} cannot be read: {error}", _COPY
            ) from error
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            span: np.ndarray = raw.astype(self.dtype, copy=False).reshape(-1, *self.shape)
        return span


_COPY = "copy the file again, or write it anew with `data prepare`"


def open_hdf5(path: Path, check: bool) -> Loaded:
    """Open `path`; labels, clients and test marks are read, samples stay in the file.

    Raises:
        DataError: not HDF5, no `x` or `y`, unlike lengths, another dtype than uint8 or float, NaN (`check`).
    """
    try:
        file = h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        raise DataError(f"{path} cannot be opened as HDF5: {error}", _COPY) from error
    try:
        return _load(file, path, check)
    except BaseException as error:
        file.close()
        if isinstance(error, OSError | RuntimeError | KeyError | ValueError | TypeError):
            raise DataError(f"{path} cannot be read: {error}", _COPY) from error
        raise


def _load(file: Any, path: Path, check: bool) -> Loaded:
    x = _table(file, "x", path)
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise DataError(f"x of {path} is {x.dtype}", "store uint8 (0 to 255) or float32")
    store = StoredRows(file, x, str(path))
    rows = len(x)
    labels = _column(file, "y", rows, path)
    if check:
        store.check()
    names = _table(file, "class_names", path).asstr()[()] if "class_names" in file else ()
    client = check_clients(_column(file, "client", rows, path), rows, str(path)) if "client" in file else None
    official = _marks(_column(file, "official_test", rows, path), path) if "official_test" in file else None
    return Loaded(
        name=str(file.attrs.get("name", path.stem)),
        where=str(path),
        store=store,
        labels=labels,
        class_names=tuple(map(str, names)),
        client=client,
        official_test=official,
        mean=tuple(map(float, file.attrs.get("mean", ()))),
        std=tuple(map(float, file.attrs.get("std", ()))),
    )


def _table(file: Any, name: str, path: Path) -> Any:
    table = file.get(name)
    if not isinstance(table, h5py.Dataset) or table.shape is None:
        raise DataError(
            f"{path} has no dataset '{name}'; it has {', '.join(file) or 'nothing'}",
            "store samples as x and labels as y, optionally client and official_test",
        )
    return table


def _column(file: Any, name: str, rows: int, path: Path) -> np.ndarray:
    """One value per sample; the shape is compared before anything of a wrong size is read."""
    table = _table(file, name, path)
    if table.shape != (rows,):
        raise DataError(
            f"x of {path} has {rows} rows, {name} has shape {table.shape}", f"give one per sample, ({rows},)"
        )
    column: np.ndarray = table[()]
    return column


def _marks(marks: np.ndarray, path: Path) -> np.ndarray:
    if marks.dtype.kind not in "biu" or not np.isin(marks, (0, 1)).all():
        raise DataError(
            f"official_test of {path} ({marks.dtype}) holds more than true and false",
            "give one true or false per sample",
        )
    return marks.astype(bool)
