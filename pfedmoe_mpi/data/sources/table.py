"""Tables: CSV (`.csv`), TSV (`.tsv`) or Parquet (`.parquet`) with a label column, numbers and codes.

Every column beside the label and the client is a feature: a number if all its values are numbers, else codes
without an order. `features` says how missing values are filled, and how columns are scaled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.dataset import MemoryRows, SourceData
from pfedmoe_mpi.data.sources.csv_rows import read_rows
from pfedmoe_mpi.data.sources.features import Standardise, to_columns
from pfedmoe_mpi.data.sources.numbering import as_number
from pfedmoe_mpi.data.sources.parquet import SUFFIXES, read_parquet
from pfedmoe_mpi.data.sources.table_column import CODES, Column, Keys
from pfedmoe_mpi.errors import DataError, nearest

_SHOWN = 20  # column names in a message
_COLUMNS = 1 << 16
_VALUES = 1 << 28  # of all columns and rows together, once codes have columns of their own
_INDEX = ("", "__index_level_0__")  # how pandas names its row numbers in CSV and in Parquet
_OTHER_MARKS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}


def load_table(path: Path, settings: Data) -> SourceData:
    """Read every row into memory: (n, columns) float32, NaN where a value is missing.

    Raises:
        DataError: not a table, a column that does not exist, a row without a label, or a column of numbers in
            which something else stands; names file and line.
    """
    header, rows, unit = _open(path)
    _check_header(path, header, settings)
    labels, clients = Keys(f"{path}: label", unit), Keys(f"{path}: client", unit)
    left_out = dict.fromkeys(settings.ignore, "named by data.ignore")
    left_out |= dict.fromkeys((name for name in header if name in _INDEX), "row numbers without a name")
    features = {
        name: Column(name, str(path), unit, coded=name in settings.categorical)
        for name in header
        if name not in {settings.label, settings.client, *left_out}
    }
    columns: list[Keys | Column | None] = [
        labels if name == settings.label else clients if name == settings.client else features.get(name)
        for name in header
    ]
    for number, values in rows:
        for column, value in zip(columns, values, strict=True):
            if column is not None:
                column.add(value, number)
    if not len(labels):
        raise DataError(f"{path} has no row below its header", "add rows")
    y, class_names = labels.numbered()
    _check_classes(path, settings.label, class_names)
    client, client_names = clients.numbered() if settings.client else (None, ())
    attributes = {}
    for name, column in features.items():
        column.check()
        reason = column.useless()
        if reason:
            left_out[name] = reason
        else:
            attributes[name] = column.attribute()
    return SourceData(
        name=path.stem,
        where=str(path),
        store=MemoryRows(_columns(path, attributes, len(y))),
        labels=y,
        class_names=class_names,
        client=client,
        client_names=client_names,
        proposals={"partition.kind": "natural"} if settings.client else {},
        fit=Standardise(tuple(len(codes) for _, codes in attributes.values()), learn=True),
        left_out=tuple(f"column '{name}': {reason}" for name, reason in left_out.items()),
    )


def _open(path: Path) -> tuple[list[str], Iterator[tuple[int, Sequence[Any]]], str]:
    """Return the column names, the rows with their numbers, and what these numbers count."""
    if path.is_dir():
        raise DataError(f"data.path = {path} is a folder", "set --data.path to one CSV, TSV or Parquet file")
    if path.suffix.lower() in SUFFIXES:
        return (*read_parquet(path), "row")
    separator = "\t" if path.suffix.lower() in {".tsv", ".tab"} else ","
    records = read_rows(path, separator, "close a quote that is left open, or shorten the text")
    _, header = next(records, (0, None))
    if header is None:
        raise DataError(f"{path} is empty", "add a line of column names, and rows")
    header = [name.strip() for name in header]
    if len(header) == 1:
        marks = [mark for mark in _OTHER_MARKS if mark in header[0] and mark != separator]
        found = f", and the line has {_OTHER_MARKS[marks[0]]}" if marks else ""
        raise DataError(
            f"{path} has one column in its first line; {_OTHER_MARKS.get(separator, 'commas')} separate the "
            f"columns of a {path.suffix or 'text'} file{found}",
            "save it as .csv with commas or as .tsv with tabs, with column names in the first line",
        )
    return header, _checked_rows(path, records, header), "line"


def _checked_rows(
    path: Path, records: Iterable[tuple[int, list[str]]], header: Sequence[str]
) -> Iterator[tuple[int, Sequence[str]]]:
    """Yield the rows with their lines; refuse one that has more or fewer values than the header."""
    for line, record in records:
        if len(record) != len(header):
            raise DataError(
                f"{path}, line {line} has {len(record)} values, and the header names {len(header)} columns",
                "give each column a value, or nothing between two separators; quote values that contain them",
            )
        yield line, record


def _check_header(path: Path, header: Sequence[str], settings: Data) -> None:
    """Refuse a table without the columns that the settings name, or with two columns of one name."""
    listed = ", ".join(header[:_SHOWN]) + (", …" if len(header) > _SHOWN else "")
    if len(header) > _COLUMNS:
        raise DataError(f"{path} has {len(header):,} columns, more than {_COLUMNS:,}", "keep those you need")
    twice = next((name for place, name in enumerate(header) if name in header[:place]), None)
    if twice is not None:
        raise DataError(f"{path} has two columns named '{twice}'", "rename one of them in the first line")
    if not settings.label:
        last = header[-1]
        raise DataError(
            f"data.label is empty; {path} has the columns {listed}",
            f"name the column that holds the label, for example --data.label '{last}'",
        )
    named = {"data.label": [settings.label], "data.client": [settings.client] if settings.client else []}
    named |= {"data.categorical": [*settings.categorical], "data.ignore": [*settings.ignore]}
    roles: dict[str, str] = {}
    for setting, names in named.items():
        for name in names:
            if name not in header:
                raise DataError(
                    f"{setting} = {name}, but {path} has the columns {listed}{nearest(name, header)}",
                    f"set --{setting} to a column of the file",
                )
            if roles.setdefault(name, setting) != setting:
                problem = f"{roles[name]} and {setting} both name the column '{name}'"
                raise DataError(problem, f"remove it from one: --{setting} OTHER_COLUMN")


def _check_classes(path: Path, label: str, names: Sequence[str]) -> None:
    """Refuse a label column of measurements, which are not classes."""
    fraction = next((name for name in names if isinstance(as_number(name), float)), None)
    if fraction is not None:
        raise DataError(
            f"data.label = {label}: {path} has {len(names)} different numbers there, such as {fraction}, and "
            "labels are names or whole numbers",
            "name a column of classes, or replace the numbers by the class they belong to",
        )


def _columns(path: Path, attributes: dict[str, tuple[np.ndarray, range]], rows: int) -> np.ndarray:
    """Return the features (n, columns); refuse a table without any, or with more than memory should hold."""
    if not attributes:
        raise DataError(f"{path} has no feature beside its label", "add columns, or shorten --data.ignore")
    total = rows * sum(max(1, len(codes)) for _, codes in attributes.values())
    if total > _VALUES:
        widest = max(attributes, key=lambda name: len(attributes[name][1]))
        raise DataError(
            f"{path}: {rows:,} rows with a column per code are {total:,} values, more than {_VALUES:,}; "
            f"'{widest}' has {len(attributes[widest][1])} of at most {CODES} codes",
            f"leave it out: --data.ignore '{widest}'",
        )
    return to_columns([*attributes.values()])
