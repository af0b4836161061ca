"""Where the vectors of clients lie: the files that a checkpoint relies on for what did not change since them.

The dataset `/elsewhere/places` has one row per client: its number, the number of the file in
`/elsewhere/files` (one name a line, in the same folder), and the offset, the length and the SHA-256 of its
bytes there. Files are named by those who hold the bytes, so that a checkpoint relies on no chain of files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
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
_REMEDY = (
    "copy that file, too; or, where both are, write a complete one: python -m pfedmoe_mpi pack {path} OUT.h5"
)


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


def read_vector(path: Path, places: Places, row: Any, file: Any = None) -> np.ndarray:
    """Return a client's vector, float32, from the file that holds it.

    Args:
        file: that file, if it is open; several threads may read it.

    Raises:
        CheckpointError: the file is missing, or the bytes are others.
    """
    name = places.files[row["file"]]
    try:
        beside = file_of(path, name)
        with nullcontext(file) if file else open(beside, "rb", opener=seal.without_waiting) as source:
            data = _bytes(source.fileno(), int(row["offset"]), int(row["length"]))
    except OSError as error:
        problem = f"{path} relies on {name} in its folder, which cannot be read: {error.strerror}"
        raise CheckpointError(problem, _REMEDY.format(path=path)) from error
    if sha256(data.data).digest() != row["sha256"].tobytes():
        where = f"{path} is damaged:" if name == path.name else f"{path} relies on {name}, where"
        problem = f"{where} the bytes of clients/{row['client']:06d} have changed"
        raise CheckpointError(problem, seal.REMEDY)
    return data.view("<f4")


def _bytes(file: int, offset: int, length: int) -> np.ndarray:
    """Return bytes of an open file, none if it ends before them."""
    is_there = offset + length <= os.fstat(file).st_size
    data = np.empty(length if is_there else 0, np.uint8)
    done = 0
    while done < len(data):
        step = os.preadv(file, [data[done:].data], offset + done)
        if not step:  # it has become shorter
            return data[:0]
        done += step
    return data


def check(path: Path, rank: int = 0, ranks: int = 1) -> None:
    """Check this rank's share of the vectors in other files on which a checkpoint relies, with plain reads.

    Raises:
        CheckpointError: a file is missing, or its bytes have changed.
    """
    places = _read(path)
    order = np.lexsort((places.rows["offset"], places.rows["file"]))
    for row in places.rows[order[rank::ranks]]:
        read_vector(path, places, row)


def files_needed(path: Path) -> set[str]:
    """Return the names of the files on which a checkpoint relies; none if it cannot be read."""
    try:
        return set(_read(path).files)
    except CheckpointError:
        return set()


def _read(path: Path) -> Places:
    """Return the places in a checkpoint, read without the HDF5 library.

    Raises:
        CheckpointError: it is not a checkpoint, or these bytes have changed.
    """
    with seal.plain(path) as file:
        ranges = {one.name: one for one in seal.read(file, path).ranges}
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
