"""Text classification: a CSV file with the label in the first column and the text in the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.dataset import MemoryRows, SourceData
from pfedmoe_mpi.data.sources.csv_rows import read_rows
from pfedmoe_mpi.data.sources.text_file import read_text
from pfedmoe_mpi.data.sources.tokens import read_texts
from pfedmoe_mpi.errors import DataError

_NAMES = "classes.txt"
_SHOWN = 10  # lines or labels in a message
_DIGITS = 20  # a label with so many digits is a name
_OTHER_MARKS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}  # that separate columns elsewhere
_TOO_LONG = "close a quote that is left open, or shorten the text: its first data.length words count"
_FIRST = "the first column must be the label; remove a header line and a column of row numbers"


def load_text(path: Path, settings: Data) -> SourceData:
    """Read every row as the numbers of its first `data.length` words or characters, (n, length) int32.

    The text is all columns after the label, joined by spaces. Labels are names or numbers. If a
    `classes.txt` lies beside the file, one name per line, labels are these names or their numbers from 1 (as
    in AG News).

    Raises:
        DataError: not CSV, a row without a text, or an unknown label; names file and line.
    """
    lines, labels = [], []

    def texts() -> Iterator[str]:
        for line, label, text in _records(path):
            lines.append(line)
            labels.append(label)
            yield text

    x, fit, warnings = read_texts(texts(), settings, str(path))
    classes, names = _classes(path, lines, labels)
    return SourceData(
        name=path.stem,
        where=str(path),
        store=MemoryRows(x),
        labels=np.array([classes[label] for label in labels], np.int64),
        class_names=names,
        proposals={"rounds": 12},
        fit=fit,
        warnings=warnings,
    )


def _records(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (first line, label, text) of every row; only one row at a time is in memory."""
    for line, record in read_rows(path, ",", _TOO_LONG):
        if len(record) == 1:
            _check_separator(path, record)
            raise DataError(
                f"{path}, line {line}: one column, expected a label and a text",
                'give rows such as "3","Title","Text"',
            )
        yield line, record[0].strip(), " ".join(record[1:])


def _classes(
    path: Path, lines: Sequence[int], labels: Sequence[str]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the class of every label, and the class names.

    Raises:
        DataError: no rows, a row whose label is missing or unknown, with its line, other separators than
            commas, or a class of `classes.txt` without a row.
    """
    if not labels:
        raise DataError(f"{path} is empty", "add rows, or remove the file")
    _check_separator(path, labels)
    empty = [str(line) for line, label in zip(lines, labels, strict=True) if not label]
    if empty:
        more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
        raise DataError(
            f"{path}: no label in line {', '.join(empty[:_SHOWN])}{more}",
            "write a label into the first column of these rows, or remove the rows"
            if empty != ["1"]
            else _FIRST,
        )
    named = path.with_name(_NAMES)
    classes, names = _given_classes(named) if named.exists() else _occurring_classes(path, labels)
    for line, label in zip(lines, labels, strict=True):
        if label not in classes:
            raise DataError(
                f"{path}, line {line}: unknown label '{label}'",
                f"the first column must be one of {', '.join(names[:_SHOWN])}, or its number from 1; "
                "remove a header line",
            )
    absent = sorted({*range(len(names))} - {classes[label] for label in labels})
    if absent:
        raise DataError(
            f"{path}: no row has the class '{names[absent[0]]}' of {named}",
            "add rows of it, or label all rows by names and remove this name from the list",
        )
    return classes, names


def _check_separator(path: Path, labels: Sequence[str]) -> None:
    """Refuse a file whose columns are separated by another mark than commas: all labels then contain it."""
    for mark, name in _OTHER_MARKS.items():
        if all(mark in label for label in labels):
            raise DataError(
                f"{path}: the columns are separated by {name}, and commas are expected",
                "save it as CSV with commas, and with quotes around texts",
            )


def _given_classes(path: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the classes of `classes.txt`: every name, and every number from 1 unless names are numbers.

    Raises:
        DataError: an empty line before the last name, or a name that occurs twice.
    """
    names = tuple(line.strip() for line in read_text(path).rstrip().splitlines())
    met: set[str] = set()
    for line, name in enumerate(names, 1):
        if not name or name in met:
            problem = f"the name '{name}' again" if name else "no name"
            raise DataError(f"{path}, line {line}: {problem}", "write the name of one class on every line")
        met.add(name)
    numbers = {} if any(map(_is_number, names)) else {str(k): k - 1 for k in range(1, len(names) + 1)}
    return {**numbers, **_places(names)}, names


def _occurring_classes(path: Path, labels: Sequence[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the classes of the labels that occur: the numbers if the last is a number, else the others."""
    numeric = _is_number(labels[-1])  # of the last row, because the first may be a header
    if not numeric and labels.count(labels[0]) == 1:
        raise DataError(
            f"{path}: no other row has the first row's label '{labels[0]}'",
            f"{_FIRST}, or give the class more rows",
        )
    same_kind = {label for label in labels if _is_number(label) == numeric}
    names = tuple(sorted(sorted(same_kind), key=int) if numeric else sorted(same_kind))
    return _places(names), names


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal() and len(label) < _DIGITS


def _places(names: Sequence[str]) -> dict[str, int]:
    return {name: place for place, name in enumerate(names)}
