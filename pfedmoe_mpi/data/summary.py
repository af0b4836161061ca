"""What a data set was taken to be, in lines for its user: the one place that says it for every source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pfedmoe_mpi.data.dataset import Dataset

_NAMES = 10  # of classes or clients
_LONGEST = 40  # characters of a name
_ROWS, _ROWS_OF_FILE = 1000, 64  # that are read for the range of values; each of a file may cost a chunk


def read_sample(data: Dataset) -> np.ndarray:
    """Return as many rows (m, ...), from all over the data, as are quickly read."""
    read = min(len(data), _ROWS_OF_FILE if data.distributed else _ROWS)
    return data.rows(np.linspace(0, len(data) - 1, read).astype(np.int64))


def summarise(data: Dataset, where: str, sample: np.ndarray) -> tuple[str, ...]:
    """Return lines on samples, classes, clients, official test part, and what is left out and why.

    Args:
        data: as its source read it, before a fit.
        sample: some of its rows (m, ...), for the range of values.
    """
    return tuple(f"data: {line}" for line in _lines(data, where, sample))


def _lines(data: Dataset, where: str, sample: np.ndarray) -> Iterator[str]:
    shape = "×".join(map(str, data.shape))
    yield f"{where}: {len(data):,} samples of {shape} {_values(data, sample)}"
    counts = np.bincount(data.labels, minlength=data.classes).tolist()
    classes = [f"{name} ({count:,})" for name, count in zip(plain(data.class_names), counts, strict=False)]
    yield f"{data.classes:,} classes (samples): {_listed(classes, data.classes)}"
    if data.client is not None:
        clients = int(data.client.max()) + 1
        names = f": {_listed(plain(data.client_names), clients)}" if data.client_names else " without names"
        yield f"{clients:,} clients of their own{names}"
    if data.official_test is not None:
        yield f"{int(data.official_test.sum()):,} samples are the official test part"
    for what in data.left_out:
        yield f"left out: {what}"


def _values(data: Dataset, x: np.ndarray) -> str:
    """Return what the values are, and between which numbers."""
    if data.tokens:
        return "tokens"
    present = x[~np.isnan(x)] if x.dtype.kind == "f" else x.ravel()
    kind = "bytes" if x.dtype == np.uint8 else "numbers"
    if not len(present):
        return f"{kind}, all missing"
    among = f" in {len(x):,} of them" if len(x) < len(data) else ""
    missing = f", {1 - len(present) / x.size:.1%} missing" if len(present) < x.size else ""
    return f"{kind} from {present.min():g} to {present.max():g}{missing}{among}"


def plain(names: Sequence[str], most: int = _NAMES) -> list[str]:
    """Return the first names, as a terminal can print them."""
    shown = [name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…" for name in names[:most]]
    return [name if name.isprintable() and name.strip() else ascii(name) for name in shown]


def _listed(names: Sequence[str], total: int) -> str:
    return ", ".join(names) + (", …" if total > len(names) else "")
