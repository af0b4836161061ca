"""HDF5 files: `x`, `y`, optionally `client`, `official_test` and names; rows are read on demand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi.data.dataset import Dataset, SourceData, check_clients, check_finite, sample_shape
from pfedmoe_mpi.data.sources.hdf5_columns import LAYOUT, numbered, read_marks
from pfedmoe_mpi.data.sources.hdf5_table import check_chunks, find_table
from pfedmoe_mpi.errors import DataError
from pfedmoe_mpi.storage import untrusted_hdf5
from pfedmoe_mpi.storage.untrusted_json import UnusableError

_SPAN = 16 << 20  # bytes read at once
_BLOCK = 64 << 10  # bytes of a block if the file has no chunks: reading so short a gap is faster than a seek
_CHUNK = 64 << 10  # bytes of a chunk that is written: ranks read scattered rows, and always whole chunks
_COPIED = 16 << 20  # bytes written at once
_NAME = 1 << 16  # characters of the data set's name
_TOKENS = 1_000_000  # as data.vocabulary
_COPY = "copy the file again, or write it again with `data prepare`"
_INSIDE = "store x and y as plain arrays in the file itself"


class FileRows:
    """Rows of an open HDF5 file; every rank opens the file itself and reads only the rows it needs."""

    distributed = True

    def __init__(self, file: Any, x: Any, where: str) -> None:
        self.shape = sample_shape(x.shape, where)
        self.tokens = x.dtype.kind in "iu" and x.dtype != np.uint8
        self.dtype = np.dtype(np.int32 if self.tokens else np.uint8 if x.dtype == np.uint8 else np.float32)
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
            self._check(samples, rows)
            out[order[low:high]] = samples
        return out

    def check(self) -> int:
        """Search the whole file for NaN, infinities and unusable tokens, a span at a time.

        Returns:
            The number of possible tokens, one more than the largest; 0 if samples are not tokens.

        Raises:
            DataError: a row holds one, or cannot be read.
        """
        step, largest = self._block * self._most, -1
        for first in range(0, len(self._x) if self.dtype != np.uint8 else 0, step):
            last = min(first + step, len(self._x))
            samples = self._read_span(first, last)
            self._check(samples, np.arange(first, last))
            largest = max(largest, int(samples.max())) if self.tokens else -1
        return largest + 1

    def _check(self, samples: np.ndarray, rows: np.ndarray) -> None:
        """Refuse these rows if one holds a NaN, an infinity, or a number that is not a token."""
        if not self.tokens:
            check_finite(samples, rows, self._where)
            return
        bad = ((samples < 0) | (samples >= _TOKENS)).any(axis=1)
        if bad.any():
            raise DataError(
                f"{self._where}: row {rows[np.argmax(bad)]} holds a token that is negative or above "
                f"{_TOKENS - 1:,}",
                "number tokens from 0, which is padding, by their frequency; store images as uint8",
            )

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
        if self.tokens:
            raw = np.clip(raw, -1, _TOKENS)  # both are refused, and an int32 holds them
        with np.errstate(over="ignore"):  # values too large for float32 become infinite, which is refused
            span: np.ndarray = raw.astype(self.dtype, copy=False).reshape(-1, *self.shape)
        return span


def open_hdf5(path: Path, check: bool) -> SourceData:
    """Open `path`: read labels, clients and test marks, and leave the samples in the file.

    Integers x (n, length), other than uint8, are tokens. Without `check` their number is not known.

    Raises:
        DataError: not HDF5, no `x` or `y`, different lengths, an unusable dtype, NaN (if `check`), values
            stored in other files, or a file that would unpack to far more than its length.
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
    x = find_table(file, "x", path, LAYOUT)
    texts = x.dtype.kind in "iu" and len(x.shape) == 2
    if x.dtype != np.uint8 and x.dtype.kind != "f" and not texts:
        problem = f"x of {path} is {x.dtype} of shape {x.shape}"
        raise DataError(problem, "store uint8 (0 to 255) or float32; tokens as integers (n, length)")
    store = FileRows(file, x, str(path))
    rows = len(x)
    labels, class_names = numbered(file, "y", "class_names", rows, path)
    vocabulary = 0
    if check:
        check_chunks(x, f"x of {path}")
        vocabulary = store.check()
    client: np.ndarray | None = None
    client_names: tuple[str, ...] = ()
    if file.id.links.exists(b"client"):
        client, client_names = numbered(file, "client", "client_names", rows, path)
        client = check_clients(client, rows, str(path))
        client_names = () if client_names == tuple(map(str, range(len(client_names)))) else client_names
    return SourceData(
        name=_name(file, path),
        where=str(path),
        store=store,
        labels=labels,
        class_names=class_names,
        client=client,
        client_names=client_names,
        official_test=read_marks(file, "official_test", rows, path),
        mean=_constants(file, "mean", store),
        std=_constants(file, "std", store),
        proposals={} if client is None else {"partition.kind": "natural"},
        vocabulary=vocabulary,
    )


def _name(file: Any, path: Path) -> str:
    name = untrusted_hdf5.read_attribute(file, "name", _NAME)
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
        for name in ("class_names", "client_names"):
            if getattr(data, name):
                file.create_dataset(name, data=list(getattr(data, name)), dtype=h5py.string_dtype())
        file.attrs["name"] = data.name
        if data.mean:
            file.attrs["mean"], file.attrs["std"] = data.mean, data.std
