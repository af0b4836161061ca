"""Clients' numbers by round in a checkpoint: the datasets `/measured/…`, as `storage.columns` describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi.storage import columns, untrusted_hdf5
from pfedmoe_mpi.storage.columns import ARRAYS, Packed
from pfedmoe_mpi.storage.untrusted_json import UnusableError

NAMES = ("columns", *ARRAYS)
_MOST_NAMES, _MOST_ENTRIES = 1 << 20, 1 << 30  # bytes


def datasets(history: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return the datasets of a history by path; none if its rows have no columns."""
    packed = columns.pack(history)
    if packed is None:
        return {}
    arrays = {name: getattr(packed, name) for name in ARRAYS}
    arrays["columns"] = np.frombuffer(packed.text.encode(), np.uint8)
    return {f"measured/{name}": array for name, array in arrays.items()}


def read(dataset: Callable[[str, Any, int], Any], clients: int, rounds: int) -> Packed:
    """Return the columns of a federation of `clients` after `rounds`; values are read when they are used.

    Args:
        dataset: returns a dataset of a path, an HDF5 type and a number of dimensions, checked.

    Raises:
        UnusableError: the datasets do not fit each other.
    """
    names = dataset("measured/columns", h5py.h5t.STD_U8LE, 1)
    entries = dataset("measured/entries", h5py.h5t.STD_I64LE, 2)
    if names.nbytes > _MOST_NAMES or entries.nbytes > _MOST_ENTRIES:
        raise UnusableError("the measured columns are too many")
    text = untrusted_hdf5.decode_utf8(names[()].tobytes(), "measured/columns")
    whose = dataset("measured/clients", h5py.h5t.STD_I32LE, 1)
    values = dataset("measured/values", h5py.h5t.IEEE_F64LE, 1)
    packed = Packed(columns.parse_columns(text), entries[()], whose, values)
    packed.check(clients, rounds)
    return packed


def joined(history: Sequence[Mapping[str, Any]], packed: Packed, clients: int) -> list[dict[str, Any]]:
    """Return a history with its columns; rows of an earlier version have their own."""
    rounds = [row["round"] for row in history if "clients" not in row]
    found = packed.by_round(clients, rounds)
    return [{**row, "clients": found[row["round"]]} if "clients" not in row else dict(row) for row in history]
