"""Numbers and codes of a table as columns of features; missing values filled and scaled per client.

A number is one column. Codes have no order: an attribute of codes is one column of 0 and 1 per code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pfedmoe_mpi.data.dataset import Dataset, MemoryRows
from pfedmoe_mpi.data.partition import Partition
from pfedmoe_mpi.errors import DataError


def to_columns(attributes: Sequence[tuple[np.ndarray, Sequence[float]]]) -> np.ndarray:
    """Return attributes as columns (n, columns) float32, NaN where a value is missing.

    Args:
        attributes: the values (n,) of each, and its codes, which are empty for a number.
    """
    total = sum(max(1, len(codes)) for _, codes in attributes)
    x = np.empty((len(attributes[0][0]), total), np.float32)
    column = 0
    for values, codes in attributes:
        missing = np.isnan(values)
        for code in codes:
            x[:, column] = np.where(missing, np.nan, values == code)
            column += 1
        if not codes:
            x[:, column] = values
            column += 1
    return x


@dataclass(frozen=True)
class Standardise:
    """The `Fit` for a table: missing values are filled and every column is standardised, per client.

    A missing number becomes the median, a missing code the most frequent one. Median, code, mean and standard
    deviation are those of the client's own training rows. A column that is missing or constant in all of them
    is 0. `codes` is the number of codes of every attribute, 0 for a number. With `learn`, a code that no
    client trains on has no column: rows with such a code are 0 in the columns of all others.
    """

    codes: tuple[int, ...]
    learn: bool

    def __call__(self, data: Dataset, partition: Partition) -> Dataset:
        raw, codes = data.rows(np.arange(len(data))), self.codes
        if self.learn:
            trained = np.concatenate([r for k, r in enumerate(partition.train) if k not in partition.unseen])
            raw, codes = _drop_untrained(raw, codes, trained)
            if not codes:
                raise DataError(f"{data.name}: training rows hold no value", "add columns with values")
        x = np.zeros_like(raw)
        for train, rows in partition.trainers():
            given = raw[rows].astype(np.float64)  # training rows first
            filled = np.where(np.isnan(given), _typical_values(given[: len(train)], codes), given)
            mean, std = filled[: len(train)].mean(axis=0), filled[: len(train)].std(axis=0)
            varying = std > 0  # False for NaN: missing in all training rows
            x[np.ix_(rows, varying)] = (filled[:, varying] - mean[varying]) / std[varying]
        assert np.isfinite(x).all(), "a missing value is left"
        return replace(data, store=MemoryRows(x), shape=x.shape[1:])


def _drop_untrained(
    raw: np.ndarray, codes: Sequence[int], trained: np.ndarray
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the columns without those of codes that the `trained` rows lack, and the codes that are left."""
    kept, left, start = np.ones(raw.shape[1], bool), [], 0
    for count in codes:
        columns = slice(start, start + max(1, count))
        if count:
            kept[columns] = (raw[trained, columns] == 1).any(axis=0)
        if kept[columns].any():
            left.append(count and int(kept[columns].sum()))
        start = columns.stop
    return raw[:, kept], tuple(left)


def _typical_values(rows: np.ndarray, codes: Sequence[int]) -> np.ndarray:
    """Return the value that replaces a missing one, per column.

    It is the median, or 1 for the most frequent code and 0 for the others; NaN if all rows lack the value.
    """
    typical = np.full(rows.shape[1], np.nan)
    start = 0
    for count in codes:
        columns = slice(start, start + max(1, count))
        present = rows[~np.isnan(rows[:, start]), columns]
        if len(present) and count:
            typical[columns] = np.arange(count) == present.sum(axis=0).argmax()
        elif len(present):
            typical[columns] = np.median(present)
        start = columns.stop
    return typical
