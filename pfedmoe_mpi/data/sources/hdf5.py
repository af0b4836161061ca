"""HDF5 files: `x`, `y`, optionally `client`, `official_test`, `class_names`; rows are read on demand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi.data.dataset import Dataset, SourceData, check_clients, check_finite, sample_shape
from pfedmoe_mpi.data.sources.hdf5_table import check_chunks, find_table
from pfedmoe_mpi.errors import DataError
from pfedmoe_mpi.storage import untrusted_hdf5
from pfedmoe_mpi.storage.untrusted_json import UnusableError

_SPAN = 16 << 20  # bytes read at once
_BLOCK = 64 << 10  # bytes of a block if the file has no chunks: reading so short a gap is faster than a seek
_CHUNK = 64 << 10  # bytes of a chunk that is written: ranks read scattered rows, and always whole chunks
_COPIED = 16 << 20  # bytes written at once
_NAMES = 1 << 16  # class names
_COPY = "copy the file again, or write it again with `data prepare`"
_LAYOUT = "store samples as x and labels as y, optionally client and official_test"
_INSIDE = "store x and y as plain arrays in the file itself"


class FileRows:
    """Rows of an open HDF5 file; every rank opens the file itself and reads only the rows it needs."""

    distributed = True

    def __init__(self, file: Any, x: Any, where: str) -> None:
        self.shape = sample_shape(x.shape, where)
        self.dtype = np.dtype(np.uint8 if x.dtype == np.uint8 else np.float32)
        self._file, self._x, self._where = file, x, where
        row_bytes = max(1, x.dtype.itemsize * int(np.prod(self.shape)))
        self._block = x.chunks[0] if x.chunks else max(1, _BLOCK // row_bytes)
        self._most = max(1, _SPAN // (row_bytes * self._block))  # blocks in one span

    def read(self, index: np.ndarray) -> np.ndarray:
        """Return rows `index` in that order, read in spans of whole blocks, each block once.

        Raises:
            DataError: the file cannot be read, or one of these rows holds a NaN or an infinity.
        """
        out = np.empty((len(index), *self.shape), self.dtype)
        order = np.argsort(index, kind="stable")
        sorted_rows = index[order]
        assert not len(sorted_rows) or 0 <= sorted_rows[0] <= sorted_rows[-1] < len(self._x), (
            "row numbers out of range"
        )
        for first, last in self._spans(sorted_rows):
            low, high = np.searchsorted(sorted_rows, (first, last))
            rows = sorted_rows[low:high]
            samples = self._read_span(first, last)[rows - first]
            check_finite(samples, rows, self._where)
            out[order[low:high]] = samples
        return out

    def check(self) -> None:
        """Search the whole file for NaN and infinities, a span at a time.

        Raises:
            DataError: a row holds one, or cannot be read.
        """
        step = self._block * self._most
        for first in range(0, len(self._x) if self.dtype != np.uint8 else 0, step):
            last = min(first + step, len(self._x))
            check_finite(self._read_span(first, last), np.arange(first, last), self._where)

    def close(self) -> None:
        self._file.close()

    def _spans(self, sorted_rows: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yield [first, last) of each run of adjacent blocks that hold these rows."""
        blocks = np.unique(sorted_rows // self._block)
        for run in np.split(blocks, np.flatnonzero(np.diff(blocks) != 1) + 1):
            for start in range(0, len(run), self._most):
                part = run[start : start + self._most]
                yield int(part[0]) * self._block, min((int(part[-1]) + 1) * self._block, len(self._x))

    def _read_span(self, first: int, last: int) -> np.ndarray:
        try:
            raw = self._x[first:last]
        except OSError as error:
            raise DataError(
                f"{self._where}: rows {first} to {last} cannot be read: {error}", _COPY
            ) from error
        with np.errstate(over="ignore"):  # values too large for float32 become infinite, which is refused
            span: np.ndarray = raw.astype(self.dtype, copy=False).reshape(-1, *self.shape)
        return span


def open_hdf5(path: Path, check: bool) -> SourceData:
    """Open `path`: read labels, clients and test marks, and leave the samples in the file.

    Raises:
        DataError: not HDF5, no `x` or `y`, different lengths, another dtype than uint8 or float, NaN (if
            `check`), values stored in other files, or a file that would unpack to far more than its length.
    """
    try:
        file = h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        if path.is_dir():
            raise DataError(
                f"data.path = {path} is a folder",
                "set --data.path to the HDF5 file, or --data.source folder for a folder of images",
            ) from error
        raise DataError(
            f"{path} cannot be opened as HDF5: {error}", untrusted_hdf5.opening_remedy(error, path, _COPY)
        ) from error
    try:
        return _load(file, path, check)
    except BaseException as error:
        file.close()
        if isinstance(error, UnusableError):
            raise DataError(f"{path}: {error}", _INSIDE) from error
        if isinstance(error, untrusted_hdf5.FROM_HDF5):
            raise DataError(f"{path} cannot be read: {error}", _COPY) from error
        raise


def _load(file: Any, path: Path, check: bool) -> SourceData:
    if check:
        untrusted_hdf5.check_heaps(file, path)
    if file.id.links.exists(b"examples") and not file.id.links.exists(b"x"):
        problem = f"{path} has no dataset 'x', but 'examples', as files of TensorFlow Federated"
        raise DataError(problem, "--data.source tff")
    x = find_table(file, "x", path, _LAYOUT)
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise DataError(f"x of {path} is {x.dtype}", "store uint8 (0 to 255) or float32")
    store = FileRows(file, x, str(path))
    rows = len(x)
    labels = _column(file, "y", rows, path)
    if check:
        check_chunks(x, f"x of {path}")
        store.check()
    client, official = (_optional(file, name, rows, path) for name in ("client", "official_test"))
    if client is not None:
        client = check_clients(client, rows, str(path))
    return SourceData(
        name=_name(file, path),
        where=str(path),
        store=store,
        labels=labels,
        class_names=_names(file, path) if file.id.links.exists(b"class_names") else (),
        client=client,
        official_test=None if official is None else _marks(official, path),
        mean=_constants(file, "mean", store),
        std=_constants(file, "std", store),
        proposals={} if client is None else {"partition.kind": "natural"},
    )


def _column(file: Any, name: str, rows: int, path: Path) -> np.ndarray:
    """Return one value per sample; check shape and type before reading."""
    table = find_table(file, name, path, _LAYOUT)
    if table.shape != (rows,):
        raise DataError(
            f"x of {path} has {rows} rows, but {name} has shape {table.shape}",
            f"give one value per sample, ({rows},)",
        )
    if table.dtype.kind not in "biuf":
        raise DataError(f"{name} of {path} is {table.dtype}", f"give one integer per sample, ({rows},)")
    check_chunks(table, f"{name} of {path}")
    column: np.ndarray = table[()]
    return column


def _optional(file: Any, name: str, rows: int, path: Path) -> np.ndarray | None:
    return _column(file, name, rows, path) if file.id.links.exists(name.encode()) else None


def _marks(marks: np.ndarray, path: Path) -> np.ndarray:
    if marks.dtype.kind not in "biu" or not np.isin(marks, (0, 1)).all():
        raise DataError(
            f"official_test of {path} ({marks.dtype}) holds values other than true and false",
            "give one boolean per sample",
        )
    return marks.astype(bool)


def _names(file: Any, path: Path) -> tuple[str, ...]:
    """Return the class names, reading one at a time, because all may point to the same long text."""
    table = find_table(file, "class_names", path, _LAYOUT)
    remedy = "give one text per class, (classes,)"
    if h5py.check_string_dtype(table.dtype) is None or len(table.shape) != 1 or len(table) > _NAMES:
        problem = f"class_names of {path} cannot be read: {table.dtype} of shape {table.shape}"
        raise DataError(problem, remedy)
    names: list[str] = []
    characters_left = 16 * _NAMES
    for number in range(len(table)):
        names.append(untrusted_hdf5.check_utf8(table.asstr()[number], "class_names"))
        characters_left -= len(names[-1])
        if characters_left < 0:
            raise DataError(f"class_names of {path} is longer than {16 * _NAMES} characters", remedy)
    return tuple(names)


def _name(file: Any, path: Path) -> str:
    name = untrusted_hdf5.read_attribute(file, "name", _NAMES)
    return path.stem if name is None else str(name)


def _constants(file: Any, name: str, store: FileRows) -> tuple[float, ...]:
    """Return attribute `mean` or `std`, not checked yet: as many numbers as a sample has, at most."""
    values = untrusted_hdf5.read_attribute(file, name, 64 + 16 * math.prod(store.shape))
    return () if values is None else tuple(map(float, np.ravel(values)))


def write_hdf5(path: Path, data: Dataset) -> None:
    """Write a data set as a file that `open_hdf5` reads.

    Raises:
        OSError, RuntimeError: from the HDF5 library.
    """
    with h5py.File(path, "w", locking="best-effort") as file:
        row_bytes = data.dtype.itemsize * int(np.prod(data.shape))
        rows = min(len(data), max(1, _CHUNK // row_bytes))  # of a chunk
        x = file.create_dataset("x", (len(data), *data.shape), data.dtype, chunks=(rows, *data.shape))
        step = rows * max(1, _COPIED // (rows * row_bytes))
        for start in range(0, len(data), step):
            index = np.arange(start, min(start + step, len(data)))
            x[start : start + step] = data.rows(index)
        file["y"] = data.labels
        if data.client is not None:
            file["client"] = data.client
        if data.official_test is not None:
            file["official_test"] = data.official_test
        file.create_dataset("class_names", data=list(data.class_names), dtype=h5py.string_dtype())
        file.attrs["name"] = data.name
        if data.mean:
            file.attrs["mean"], file.attrs["std"] = data.mean, data.std
