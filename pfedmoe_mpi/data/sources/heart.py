"""Heart disease of four hospitals (UCI): a folder of `processed.HOSPITAL.data`, one natural client each.

Source: A. Janosi, W. Steinbrunn, M. Pfisterer, R. Detrano: Heart Disease, UCI Machine Learning Repository,
1989 (CC BY 4.0): 13 attributes and a target, comma-separated, with or without a line of their names; missing
values are `?`, empty, or -9, as its documentation has them. Target 0 is healthy, 1 to 4 are degrees of
disease, here one class.

Chest pain (cp), resting ECG, the slope of ST and thal become one column per code, as their codes have no
order; ca counts vessels and stays a number, as do all others. A cholesterol of 0 is kept as the files have
it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pfedmoe_mpi.data.dataset import Dataset, HeldRows, Loaded
from pfedmoe_mpi.data.partition import Partition
from pfedmoe_mpi.data.sources.text_file import text_of
from pfedmoe_mpi.errors import DataError

# Every attribute in the order of the files, with its codes if they are names and no numbers.
ATTRIBUTES: dict[str, tuple[int, ...]] = {
    "age": (),
    "sex": (),
    "cp": (1, 2, 3, 4),
    "trestbps": (),
    "chol": (),
    "fbs": (),
    "restecg": (0, 1, 2),
    "thalach": (),
    "exang": (),
    "oldpeak": (),
    "slope": (1, 2, 3),
    "ca": (),
    "thal": (3, 6, 7),
}
TARGETS = 5  # 0 to 4
MISSING = ("", "?")
MISSING_NUMBER = -9.0  # below what any attribute can be
# A hospital has 100 to 240 training patients: with the default step the large MLPs learn them by heart.
TRAINING = {"train.lr": 0.005, "train.lr_shared": 0.005, "train.weight_decay": 0.03}


def load_heart(root: Path) -> Loaded:
    """All hospitals in memory, in alphabetical order: (n, 22) float32, NaN where a value is missing.

    Raises:
        DataError: no such files, or one with a line that is no patient; names file and line.
    """
    files = sorted(root.glob("processed.*.data"))
    if not files:
        raise DataError(
            f"{root} has no file processed.HOSPITAL.data",
            "--data.path names the folder of UCI's Heart Disease: processed.cleveland.data and so on",
        )
    tables = [_patients(path) for path in files]
    table = np.concatenate(tables)
    return Loaded(
        name="heart disease",
        where=f"heart disease in {root}",
        store=HeldRows(_columns(table[:, :-1])),
        labels=(table[:, -1] > 0).astype(np.int64),
        class_names=("healthy", "sick"),
        client=np.repeat(np.arange(len(files)), [len(rows) for rows in tables]),
        client_names=tuple(path.name.split(".")[1] for path in files),
        proposals={"partition.kind": "natural", "clients": len(files), **TRAINING},
        fit=standardised,
    )


def _patients(path: Path) -> np.ndarray:
    """(n, 14) float64 of one file, NaN where a value is missing."""
    lines = [(number, line.strip()) for number, line in enumerate(text_of(path).splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line]
    if lines[0][1].lower().startswith("age,"):
        lines = lines[1:]
    if not lines:
        raise DataError(f"{path} has no patient", "give it rows, or remove it")
    return np.array([_patient(line.split(","), f"{path}, line {number}") for number, line in lines])


def _patient(values: Sequence[str], where: str) -> list[float]:
    names = (*ATTRIBUTES, "target")
    if len(values) != len(names):
        raise DataError(
            f"{where}: {len(values)} values, where {len(names)} are expected",
            f"give {', '.join(names)}, separated by commas; `?` or nothing for what is missing",
        )
    row = [_number(name, value.strip(), where) for name, value in zip(names, values, strict=True)]
    if row[-1] not in range(TARGETS):
        raise DataError(
            f"{where}: target '{values[-1].strip()}' is no label",
            f"the target is 0 (healthy) to {TARGETS - 1}; leave out patients without one",
        )
    return row


def _number(name: str, value: str, where: str) -> float:
    if value in MISSING:
        return math.nan
    try:
        number = float(value)
    except ValueError:
        number = math.inf
    if not math.isfinite(number):
        remedy = "give a number; `?` or nothing for what is missing"
        raise DataError(f"{where}: {name} '{value}' is no number", remedy)
    if number == MISSING_NUMBER:
        return math.nan
    codes = ATTRIBUTES.get(name)
    if codes and number not in codes:
        listed = ", ".join(map(str, codes))
        raise DataError(f"{where}: {name} is {value}", f"its codes are {listed}; `?` or nothing for missing")
    return number


def _columns(table: np.ndarray) -> np.ndarray:
    """Attributes (n, 13) as columns (n, 22) float32: one per number, one of 0 and 1 per code."""
    columns = []
    for values, codes in zip(table.T, ATTRIBUTES.values(), strict=True):
        indicators = [np.where(np.isnan(values), np.nan, values == code) for code in codes]
        columns += indicators or [values]
    return np.stack(columns, 1).astype(np.float32)


def standardised(data: Dataset, partition: Partition) -> Dataset:
    """Missing values filled in, every column of mean 0 and standard deviation 1, by each client for itself.

    A number that is missing becomes the median, a code the most frequent one, of the client's own training
    rows; so are mean and deviation. A column that they do not have, or that is the same in all of them, tells
    the client nothing and is 0.
    """
    raw = data.rows(np.arange(len(data))).astype(np.float64)
    x = np.zeros_like(raw)
    for train, rows in partition.trainers():
        typical = _typical(raw[train])
        filled = np.where(np.isnan(raw), typical, raw)
        mean, std = filled[train].mean(axis=0), filled[train].std(axis=0)
        known = std > 0  # False for NaN: missing in all training rows
        x[np.ix_(rows, known)] = (filled[rows][:, known] - mean[known]) / std[known]
    assert np.isfinite(x).all(), "a missing value is left"
    return replace(data, store=HeldRows(x.astype(np.float32)))


def _typical(rows: np.ndarray) -> np.ndarray:
    """What stands for a missing value, (22,): median, or 1 for the most frequent code; NaN if all are."""
    typical = np.full(rows.shape[1], np.nan)
    at = 0
    for codes in ATTRIBUTES.values():
        place = slice(at, at + max(1, len(codes)))
        known = rows[~np.isnan(rows[:, at]), place]
        if len(known) and codes:
            typical[place] = np.arange(len(codes)) == known.sum(axis=0).argmax()
        elif len(known):
            typical[place] = np.median(known)
        at = place.stop
    return typical
