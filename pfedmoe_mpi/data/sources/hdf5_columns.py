"""The columns of an HDF5 file beside the samples: labels, clients, their names, and test marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi.data.sources.hdf5_table import check_chunks, find_table, most_unpacked
from pfedmoe_mpi.data.sources.numbering import renumber
from pfedmoe_mpi.errors import DataError
from pfedmoe_mpi.storage import untrusted_hdf5

LAYOUT = "store samples as x and labels as y, optionally client and official_test"
_NAMES = 1 << 16
_BLOCK, _SPAN = 1 << 10, 64 << 20  # texts, and bytes, that are read at once


def numbered(file: Any, name: str, names: str, rows: int, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return labels or clients (n,), and the names of the numbers 0, 1 and so on.

    If the file has the dataset `names`, the column holds places in it. Otherwise its integers or texts are
    numbered from 0 in sorted order, and are themselves the names.

    Raises:
        DataError: not one integer or text per sample, or texts although there are `names`.
    """
    table = find_table(file, name, path, LAYOUT)
    if table.shape != (rows,):
        raise DataError(
            f"x of {path} has {rows} rows, but {name} has shape {table.shape}",
            f"give one value per sample, ({rows},)",
        )
    named, texts = file.id.links.exists(names.encode()), h5py.check_string_dtype(table.dtype) is not None
    if not texts and table.dtype.kind not in "iu":
        remedy = f"give one integer or text per sample, ({rows},)"
        raise DataError(f"{name} of {path} is {table.dtype}", remedy)
    if texts and named:
        raise DataError(f"{name} of {path} holds texts, and {names} gives names, too", f"remove {names}")
    check_chunks(table, f"{name} of {path}")
    if texts:
        values = read_texts(table, f"{name} of {path}", path, most_unpacked(path))
        if not all(values):
            problem = f"{name} of {path} is empty in row {values.index('')}"
            raise DataError(problem, "write it into the row, or remove the row")
        places, found = renumber(dict.fromkeys(values))
        return np.array([places[value] for value in values], np.int64), found
    column = table[()]
    if named:
        return column, read_names(file, names, path)
    different, inverse = np.unique(column, return_inverse=True)
    places, found = renumber(different.tolist())
    return np.array([*places.values()], np.int64)[inverse], found


def read_texts(table: Any, where: str, path: Path, most: int) -> list[str]:
    """Return the texts of a dataset, a few at a time, because all may point to the same long text.

    Raises:
        DataError: more than `most` characters.
        UnusableError: a text that is not UTF-8.
    """
    texts: list[str] = []
    left = most
    block = max(1, min(_BLOCK, _SPAN // max(1, path.stat().st_size)))  # each is shorter than the file
    for start in range(0, len(table), block):
        for text in table.asstr()[start : start + block]:
            texts.append(untrusted_hdf5.check_utf8(text, where))
            left -= len(text)
        if left < 0:
            raise DataError(f"{where} is longer than {most} characters", "shorten the texts")
    return texts


def read_marks(file: Any, name: str, rows: int, path: Path) -> np.ndarray | None:
    """Return a mask (n,) that the file may have; refuse values other than true and false."""
    if not file.id.links.exists(name.encode()):
        return None
    table = find_table(file, name, path, LAYOUT)
    if table.shape != (rows,):
        raise DataError(
            f"x of {path} has {rows} rows, but {name} has shape {table.shape}",
            f"give one value per sample, ({rows},)",
        )
    check_chunks(table, f"{name} of {path}")
    marks = table[()] if table.dtype.kind in "biu" else np.full(1, 2)
    if not np.isin(marks, (0, 1)).all():
        raise DataError(
            f"{name} of {path} ({table.dtype}) holds values other than true and false",
            "give one boolean per sample",
        )
    return marks.astype(bool)


def read_names(file: Any, name: str, path: Path) -> tuple[str, ...]:
    """Return the names of classes or clients."""
    table = find_table(file, name, path, LAYOUT)
    if h5py.check_string_dtype(table.dtype) is None or len(table.shape) != 1 or len(table) > _NAMES:
        problem = f"{name} of {path} cannot be read: {table.dtype} of shape {table.shape}"
        raise DataError(problem, f"give one text per {name.partition('_')[0]}")
    return tuple(read_texts(table, f"{name} of {path}", path, 16 * _NAMES))
