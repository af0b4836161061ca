"""Data from a function of the user's own: `--data.source ./mydata.py:load`.

The function is called without arguments, or with `data.path` if it has a parameter. It returns (x, y) or
(x, y, client), as arrays or tensors, or a torch data set with such items. x is uint8 or float, (n, C, H, W),
(n, H, W) or (n, features); labels and clients are integers or texts, numbered in sorted order. Every rank
calls it, so it must return the same rows every time; torch's, numpy's and Python's generators are seeded.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from pfedmoe_mpi import user_code
from pfedmoe_mpi.data.dataset import MemoryRows, SourceData, check_finite, sample_shape
from pfedmoe_mpi.data.sources.numbering import renumber
from pfedmoe_mpi.errors import CodeError, DataError
from pfedmoe_mpi.models import generators

_REMEDY = "return arrays (x, y) or (x, y, client), or a torch data set with such items"


def load_own(reference: str, path: str) -> SourceData:
    """Call the function of a reference and read what it returns into memory.

    Raises:
        CodeError: its code raised an exception.
        DataError: it returned something else, rows of different lengths, or NaN.
    """
    where = f"{user_code.label(reference)} in {user_code.path(reference)}"
    function = user_code.load(reference)
    with generators.kept():
        generators.seed(0)
        try:
            result = function(path) if inspect.signature(function).parameters else function()
            columns = _columns(result)
        except DataError:
            raise
        except (Exception, SystemExit) as error:
            raise CodeError.of(user_code.path(reference), error) from error
    if columns is None:
        raise DataError(f"{where} returned a {type(result).__name__} that is not data", _REMEDY)
    x, y, client = columns
    lengths = {len(column) for column in (x, y, client) if column is not None}
    if len(lengths) != 1:
        raise DataError(f"{where} returned columns of {sorted(lengths)} rows", "return one label per sample")
    shape = sample_shape(x.shape, where)
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise DataError(f"x of {where} is {x.dtype}", "return uint8 (0 to 255) or float32")
    x = np.ascontiguousarray(x, np.uint8 if x.dtype == np.uint8 else np.float32).reshape(-1, *shape)
    check_finite(x, np.arange(len(x)), where)
    labels, class_names = _numbered(y)
    clients, client_names = (None, ()) if client is None else _numbered(client)
    return SourceData(
        name=user_code.label(reference),
        where=where,
        store=MemoryRows(x),
        labels=labels,
        class_names=class_names,
        client=clients,
        client_names=client_names,
        proposals={"partition.kind": "natural", "clients": len(client_names)} if client_names else {},
    )


def _columns(result: Any) -> tuple[np.ndarray, Sequence[Any], Sequence[Any] | None] | None:
    """Return x, labels and clients of what the function returned; None if it is neither."""
    if isinstance(result, tuple) and len(result) in {2, 3}:
        columns: Sequence[Any] = [np.asarray(column) for column in result]
    elif (
        hasattr(result, "__getitem__")
        and hasattr(result, "__len__")
        and not isinstance(result, tuple | str | dict)
    ):
        columns = list(zip(*(result[row] for row in range(len(result))), strict=True))
        columns[:1] = [np.stack([np.asarray(sample) for sample in columns[0]])] if columns else []
    else:
        return None
    if len(columns) not in {2, 3} or any(np.ndim(column) != 1 for column in columns[1:]):
        return None
    x, labels, *client = columns
    return x, labels, client[0] if client else None


def _numbered(values: Sequence[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the numbers (n,) int64 of labels or clients, and their names in sorted order."""
    plain = [value.item() if hasattr(value, "item") else value for value in values]
    numbers, names = renumber(dict.fromkeys(plain))
    return np.array([numbers[value] for value in plain], np.int64), names
