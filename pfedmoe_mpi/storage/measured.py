"""Clients' numbers by round in a run folder: HDF5 files `measured/000001.h5`, named by their first round.

A file holds the arrays that `columns` describes, and the attribute `clients`, the number of clients. The last
file is replaced as a whole in every round that measures clients, and a new one begins when it is full. So a
run that is killed leaves complete files.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi.storage import columns, untrusted_hdf5
from pfedmoe_mpi.storage.columns import ARRAYS, ClientColumns, Packed, has_columns
from pfedmoe_mpi.storage.untrusted_json import UnusableError

FOLDER = "measured"
FULL = 1_000_000  # values; a file that has as many is full
_MOST_NAMES = 1 << 20  # bytes
_ANY_ROUND = 1 << 40

Rows = Sequence[Mapping[str, Any]]


def append(folder: Path, history: Rows) -> None:
    """Write the last round of a history; the rounds before it are there.

    Raises:
        OSError: it cannot be written; the files are as before.
    """
    if not history or not has_columns(history[-1]):
        return
    first = max(_starts(folder), default=history[-1]["round"])
    rows = [row for row in history if row["round"] >= first]
    before, packed = columns.pack(rows[:-1]), columns.pack(rows)
    assert packed
    if before and len(before.entries) == len(packed.entries):
        return
    if before and len(before.values) >= FULL:
        rows, packed = rows[-1:], columns.pack(rows[-1:])
    _write(folder, rows[0]["round"], packed, history[-1]["clients"].clients)


def rewrite(folder: Path, history: Rows) -> None:
    """Replace the files by those of a history.

    Raises:
        OSError: they cannot be written.
    """
    groups: list[list[Mapping[str, Any]]] = []
    values = FULL
    for row in (row for row in history if has_columns(row)):
        new = sum(row["clients"].lengths())
        if values >= FULL and (new or not groups):
            groups.append([])
            values = 0
        groups[-1].append(row)
        values += new
    names = {f"{group[0]['round']:06d}.h5" for group in groups}
    for path in folder.glob("*.h5") if folder.is_dir() else ():
        if path.name not in names:
            path.unlink()
    for group in groups:
        _write(folder, group[0]["round"], columns.pack(group), group[0]["clients"].clients)


def read(folder: Path, rounds: Sequence[int]) -> dict[int, ClientColumns]:
    """Return the columns of the rounds that the files hold.

    Raises:
        UnusableError, OSError: a file cannot be read, or was not written by this program.
    """
    starts = _starts(folder)
    found: dict[int, ClientColumns] = {}
    for first, after in pairwise([*starts, max(rounds, default=0) + 1]):
        path = folder / f"{first:06d}.h5"
        try:
            with h5py.File(path, "r", locking="best-effort") as file:
                clients, packed = _read(file)
            packed.check(clients, _ANY_ROUND)
            packed.check_values(clients)
        except untrusted_hdf5.FROM_HDF5 as error:
            raise UnusableError(f"{path.name} is damaged ({error})") from error
        found |= packed.by_round(clients, [round for round in rounds if first <= round < after])
    return found


def holds(folder: Path, history: Rows) -> bool:
    """Return whether the files hold as many numbers of every round as a history."""
    wanted = {row["round"]: row["clients"].lengths() for row in history if has_columns(row)}
    try:
        found = read(folder, list(wanted))
    except (UnusableError, OSError):
        return False
    return {round: one.lengths() for round, one in found.items()} == wanted


def _starts(folder: Path) -> list[int]:
    """Return the first rounds of the files, ascending."""
    stems = [path.stem for path in folder.glob("*.h5")]
    return sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit())


def _write(folder: Path, first: int, packed: Packed | None, clients: int) -> None:
    """Replace a file in one step. It is made in memory, where HDF5 cannot fail on a full disk."""
    assert packed
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        file.attrs["clients"] = clients
        file["columns"] = np.frombuffer(packed.text.encode(), np.uint8)
        for name, kind in ARRAYS.items():
            file[name] = np.asarray(getattr(packed, name), kind)
    folder.mkdir(exist_ok=True)
    path = folder / f"{first:06d}.h5"
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(image.getbuffer())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def _read(file: Any) -> tuple[int, Packed]:
    """Return the number of clients and the arrays of an open file."""
    clients = untrusted_hdf5.read_attribute(file, "clients", 8)
    if not isinstance(clients, int | np.integer):
        raise UnusableError("it has no number of clients")
    arrays = {}
    for name, kind in {"columns": "u1", **ARRAYS}.items():
        dataset = untrusted_hdf5.find_dataset(file, name)
        most = _MOST_NAMES if name == "columns" else os.fstat(file.id.get_vfd_handle()).st_size
        if dataset is None or dataset.dtype != np.dtype(kind) or dataset.nbytes > most:
            raise UnusableError(f"it has no usable {name}")
        arrays[name] = dataset[()]
    names = columns.parse_columns(untrusted_hdf5.decode_utf8(arrays.pop("columns").tobytes(), "columns"))
    return int(clients), Packed(names, **arrays)
