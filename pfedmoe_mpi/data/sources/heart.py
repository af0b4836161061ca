"""Heart disease of four hospitals (UCI): a folder of `processed.HOSPITAL.data`, one natural client each.

Source: A. Janosi, W. Steinbrunn, M. Pfisterer, R. Detrano: Heart Disease, UCI Machine Learning Repository,
1989 (CC BY 4.0). Files have 13 attributes and a target, comma-separated, with or without a header line.
Missing values are `?`, empty, or -9 as in its documentation. Target 0 is healthy; 1 to 4 are degrees of
disease, which are one class here.

Chest pain (cp), resting ECG, the slope of ST and thal become one column per code, because their codes have no
order. ca counts vessels and stays a number, as do all other attributes. A cholesterol of 0 is kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pfedmoe_mpi.data.dataset import MemoryRows, SourceData
from pfedmoe_mpi.data.sources.features import Standardise, to_columns
from pfedmoe_mpi.data.sources.text_file import read_lines
from pfedmoe_mpi.errors import DataError

# Every attribute in the order of the files, with its codes if it is categorical.
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
MISSING_NUMBER = -9.0  # below any possible value of an attribute
_LONGEST = 4096  # characters of a line; a longer one is not a patient
# A hospital has 100 to 240 training patients; at the default learning rate the large MLPs overfit them.
TRAINING = {"train.lr": 0.005, "train.lr_shared": 0.005, "train.weight_decay": 0.03}


def load_heart(root: Path) -> SourceData:
    """Read all hospitals into memory, in alphabetical order: (n, 22) float32, NaN where a value is missing.

    Raises:
        DataError: no such files, two of one hospital, or a line that is not a patient; names file and line.
    """
    files = sorted(root.glob("processed.*.data"))
    if not files:
        raise DataError(
            f"{root} has no file processed.HOSPITAL.data",
            "set --data.path to the folder of UCI's Heart Disease: processed.cleveland.data and so on",
        )
    hospitals = tuple(path.name.split(".")[1] for path in files)
    twice = [name for name, count in Counter(hospitals).items() if count > 1]
    if twice:
        listed = " and ".join(path.name for path in files if path.name.split(".")[1] == twice[0])
        raise DataError(f"{listed} in {root} are both hospital {twice[0]}", "keep one of them in the folder")
    tables = [_patients(path) for path in files]
    table = np.concatenate(tables)
    return SourceData(
        name="heart disease",
        where=f"heart disease in {root}",
        store=MemoryRows(to_columns([*zip(table[:, :-1].T, ATTRIBUTES.values(), strict=True)])),
        labels=(table[:, -1] > 0).astype(np.int64),
        class_names=("healthy", "sick"),
        client=np.repeat(np.arange(len(files)), [len(rows) for rows in tables]),
        client_names=hospitals,
        proposals={"partition.kind": "natural", "clients": len(files), **TRAINING},
        fit=Standardise(tuple(map(len, ATTRIBUTES.values())), learn=False),
    )


def _patients(path: Path) -> np.ndarray:
    """Return the patients of one file, (n, 14) float64, NaN where a value is missing."""
    lines = [(number, line.strip()) for number, line in enumerate(read_lines(path, _LONGEST), 1)]
    lines = [(number, line) for number, line in lines if line]
    if not lines:
        raise DataError(f"{path} is empty", "add rows, or remove the file")
    if lines[0][1].lower().startswith("age,"):
        lines = lines[1:]
    if not lines:
        raise DataError(f"{path} has no patient", "add rows, or remove the file")
    return np.array([_patient(line.split(","), f"{path}, line {number}") for number, line in lines])


def _patient(values: Sequence[str], where: str) -> list[float]:
    """Return one patient's 13 attributes and target as numbers."""
    names = (*ATTRIBUTES, "target")
    if len(values) != len(names):
        raise DataError(
            f"{where} has {len(values)} values, expected {len(names)}",
            f"give {', '.join(names)}, separated by commas; `?` or nothing for a missing value",
        )
    row = [_number(name, value.strip(), where) for name, value in zip(names, values, strict=True)]
    if row[-1] not in range(TARGETS):
        raise DataError(
            f"{where}: target '{values[-1].strip()}' is not a label",
            f"give 0 (healthy) to {TARGETS - 1}, and remove patients without a target",
        )
    return row


def _number(name: str, value: str, where: str) -> float:
    """Return an attribute as a number, NaN if it is missing."""
    if value in MISSING:
        return math.nan
    try:
        number = float(value)
    except ValueError:
        number = math.inf
    if not math.isfinite(number):
        remedy = "give a number; `?` or nothing for a missing value"
        raise DataError(f"{where}: {name} '{value}' is not a number", remedy)
    if number == MISSING_NUMBER:
        return math.nan
    codes = ATTRIBUTES.get(name)
    if codes and number not in codes:
        listed = ", ".join(map(str, codes))
        raise DataError(
            f"{where}: {name} = {value} is not a code",
            f"give one of {listed}; `?` or nothing for a missing value",
        )
    return number
