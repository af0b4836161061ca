"""Where the vectors of clients lie: the files that a checkpoint relies on for what did not change since them.

The dataset `/elsewhere/places` has one row per client: its number, the number of the file in
`/elsewhere/files` (one name a line, in the same folder), and the offset, the length and the SHA-256 of its
bytes there. Files are named by those who hold the bytes, so that a checkpoint relies on no chain of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi.checkpoint import seal
from pfedmoe_mpi.errors import CheckpointError

NAME = re.compile(r"round-(\d+)(-partial)?\.h5")
FILES, ROWS = "elsewhere/files", "elsewhere/places"
ROW = np.dtype(
    [("client", "<i8"), ("file", "<i8"), ("offset", "<i8"), ("length", "<i8"), ("sha256", "u1", (32,))]
)
TYPE = h5py.h5t.py_create(ROW, logical=True)


@dataclass(frozen=True)
class Places:
    """The places of clients' vectors, ascending by client; `rows` has the fields of ROW."""

    files: tuple[str, ...] = ()
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, ROW))

    @classmethod
    def of(cls, name: str, places: Mapping[int, tuple[int, int, bytes]]) -> Places:
        """Return the places (offset, length, SHA-256) of clients in one file."""
        rows = np.empty(len(places), ROW)
        for row, (client, (offset, length, digest)) in zip(rows, sorted(places.items()), strict=True):
            row["client"], row["file"], row["offset"], row["length"] = client, 0, offset, length
            row["sha256"] = np.frombuffer(digest, np.uint8)
        return cls((name,), rows)

    def chosen(self, mask: np.ndarray) -> Places:
        """Return the rows that a mask selects, and the files that these need."""
        rows = self.rows[mask].copy()
        used, rows["file"] = np.unique(rows["file"], return_inverse=True)
        return Places(tuple(self.files[number] for number in used), rows)

    def updated(self, newer: Places) -> Places:
        """Return the places in which those of the newer ones count for their clients."""
        old = self.chosen(~np.isin(self.rows["client"], newer.rows["client"]))
        later = newer.rows.copy()
        later["file"] += len(old.files)
        rows = np.concatenate([old.rows, later])
        both = Places((*old.files, *newer.files), rows[np.argsort(rows["client"], kind="stable")])
        return Places.joined(both)

    def joined(self) -> Places:
        """Return the places with every file named once."""
        names = tuple(dict.fromkeys(self.files))
        rows = self.rows.copy()
        number = np.array([names.index(name) for name in self.files], np.int64)
        rows["file"] = number[rows["file"]] if len(rows) else rows["file"]
        return Places(names, rows)

    def find(self, client: int) -> Any:
        """Return the row of a client, None if it has none."""
        at = int(np.searchsorted(self.rows["client"], client))
        return self.rows[at] if at < len(self.rows) and self.rows["client"][at] == client else None


def is_name(name: str) -> bool:
    """Return whether a name is that of a restart point, which others may rely on."""
    return bool(NAME.fullmatch(name))


def file_of(path: Path, name: str) -> Path:
    """Return a file on which a checkpoint relies; it is beside it, or beside what its link points to."""
    beside = path.parent / name
    return beside if beside.exists() else Path(path.resolve().parent, name)


def files_needed(path: Path) -> set[str]:
    """Return the names of the files on which a checkpoint relies; none if it is missing or damaged.

    Raises:
        OSError: it cannot be read now.
    """
    try:
        with seal.errors(path), open(path, "rb", opener=seal.without_waiting) as file:
            return set(read(file, seal.read(file, path), path).files)
    except CheckpointError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError | IsADirectoryError):
            raise cause from error
        return set()


def read(file: Any, sealed: seal.Seal, path: Path) -> Places:
    """Return the places of vectors in other files, read without the HDF5 library.

    Raises:
        CheckpointError: these bytes have changed, or contradict themselves.
    """
    ranges = {one.name: one for one in sealed.ranges}
    if FILES not in ranges or ROWS not in ranges:
        return Places()
    found = []
    for name in (FILES, ROWS):
        file.seek(ranges[name].offset)
        found.append(file.read(ranges[name].length))
        if sha256(found[-1]).digest() != ranges[name].digest:
            raise CheckpointError(f"{path} is damaged: the bytes of {name} have changed", seal.REMEDY)
    names = tuple(found[0].decode(errors="replace").split("\n"))
    whole = len(found[1]) % ROW.itemsize == 0
    rows = np.frombuffer(found[1], ROW) if whole else np.empty(0, ROW)
    if not whole or contradiction(names, rows):
        raise CheckpointError(
            f"{path} is not a checkpoint of this program: {ROWS} contradicts itself", seal.REMEDY
        )
    return Places(names, rows)


def contradiction(names: Iterable[str], rows: np.ndarray) -> str:
    """Return why rows cannot be places in files of these names, or nothing if they can."""
    names = list(names)
    if not all(NAME.fullmatch(name) for name in names) or len({*names}) != len(names):
        return f"{FILES} has names that are not those of checkpoints"
    numbers = [rows[name] for name in ("client", "file", "offset", "length")]
    if not all((column >= 0).all() for column in numbers) or not (rows["file"] < len(names)).all():
        return f"{ROWS} has numbers out of range"
    if not (np.diff(rows["client"]) > 0).all():
        return f"{ROWS} does not name each client once, in order"
    return ""
