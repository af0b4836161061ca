"""The datasets of a sealed HDF5 file, each checked against the seal before it is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi.checkpoint.opened import Opened, open_files
from pfedmoe_mpi.core.flat import Entry, Layout
from pfedmoe_mpi.storage import untrusted_hdf5, untrusted_json
from pfedmoe_mpi.storage.untrusted_json import UnusableError

ATTRIBUTE = 1 << 20  # bytes; this program writes attributes of one line
FLOAT, INT = h5py.h5t.IEEE_F32LE, h5py.h5t.STD_I64LE


class SealedFile:
    """A file whose seal was verified, open for reading.

    Args:
        source: its path, or its files as they were opened before.
    """

    def __init__(self, source: Path | Opened) -> None:
        self.files = source if isinstance(source, Opened) else open_files(source)
        self.path = self.files.path
        self._ranges = {one.name: one for one in self.files.seal.ranges}
        self._layouts: dict[str, Layout] = {}
        self._file: Any = None

    def _group(self, name: str) -> Any:
        """Return a group of the root, checked to be one."""
        group = self._file.get(name) if self._file.id.links.exists(name.encode()) else None
        if not isinstance(group, h5py.Group):
            raise UnusableError(f"it has no group {name}")
        return group

    def _dataset(self, key: str, kind: Any = None, dimensions: int = 1) -> Any:
        """Return a dataset, checked against the seal; `kind` is its HDF5 type, None for a text."""
        dataset = untrusted_hdf5.find_dataset(self._file, key)
        if dataset is None:
            raise UnusableError(f"it has no {key}")
        stored = dataset.id.get_type()
        if kind is None and (not isinstance(stored, h5py.h5t.TypeStringID) or stored.is_variable_str()):
            raise UnusableError(f"{key} is not a text of fixed length")
        if len(dataset.shape) != dimensions or (kind is not None and stored != kind):
            raise UnusableError(f"{key} is {dataset.dtype} of shape {dataset.shape}")
        if dataset.id.get_create_plist().get_layout() != h5py.h5d.CONTIGUOUS:
            raise UnusableError(f"{key} is not stored in one piece")
        length = stored.get_size() * math.prod(dataset.shape)
        sealed = self._ranges.get(key)
        place = (sealed.offset, sealed.length) if sealed else None
        if place != ((dataset.id.get_offset(), length) if length else None):
            raise UnusableError(f"{key} lies elsewhere than the seal says")
        return dataset

    def _text(self, key: str) -> str:
        """Return a text dataset."""
        dataset = self._dataset(key, dimensions=0)
        kind = dataset.id.get_type()
        raw = np.empty((), f"S{kind.get_size()}")
        dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, raw, kind)
        return untrusted_hdf5.decode_utf8(bytes(raw[()]), key)

    def _numbers(self, key: str) -> np.ndarray:
        """Return an int64 dataset."""
        return np.asarray(self._dataset(key, INT)[()], np.int64)

    def _check_vector(self, key: str) -> str:
        """Check a vector and its layout; return the layout's digest."""
        vector = self._dataset(key, FLOAT)
        digest = untrusted_hdf5.read_attribute(vector, "layout", ATTRIBUTE)
        if not isinstance(digest, str) or not digest.isalnum():
            raise UnusableError(f"{key} does not name a layout")
        self._load_layout(digest)
        if self._layouts[digest].size != vector.shape[0]:
            size = self._layouts[digest].size
            raise UnusableError(f"{key} has {vector.shape[0]} numbers, but its layout has {size}")
        return digest

    def _load_layout(self, digest: str) -> None:
        if digest not in self._layouts:
            self._layouts[digest] = _layout(self._text(f"layouts/{digest}"), digest)

    def _layout_of(self, key: str) -> Layout:
        return self._layouts[untrusted_hdf5.read_attribute(self._file[key], "layout", ATTRIBUTE)]


def _layout(text: str, digest: str) -> Layout:
    """Return the layout of a text; raise UnusableError if `digest` is not its own."""
    layout = parse_layout(text, f"layouts/{digest}")
    if layout.digest != digest:
        raise UnusableError(f"layouts/{digest} is not the layout of this digest")
    return layout


def parse_layout(text: str, what: str = "the layout") -> Layout:
    """Return the layout of a text, checked: its tensors lie one after the other, and their names differ.

    Raises:
        UnusableError: it is not a layout.
    """
    rows: Any = untrusted_json.parse(text, what)
    row: Any
    entries: list[Entry] = []
    end = 0
    for row in rows if isinstance(rows, list) else (None,):
        fits = isinstance(row, list) and [type(item) for item in row] == [str, list, int, bool]
        if not fits or row[2] != end or not all(type(n) is int and n >= 0 for n in row[1]):
            raise UnusableError(f"{what} is not a layout")
        entries.append(Entry(row[0], tuple(row[1]), row[2], row[3]))
        end += entries[-1].size
    if len({entry.name for entry in entries}) != len(entries):
        raise UnusableError(f"{what} names a tensor twice")
    return Layout(tuple(entries))
