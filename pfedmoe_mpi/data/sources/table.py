"""Tables: CSV, TSV or Parquet with a label column, and data sets that Hugging Face's `datasets` saved.

Samples are a column of images, columns of texts, or else all columns beside label and client as features: a
number if all its values are numbers, else codes without an order. `features` says how missing values are
filled, and how columns are scaled. pyarrow reads what `datasets` writes, so that library is not needed: no
code of a data set is run, and no cache is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.dataset import IMAGENET_MEAN, IMAGENET_STD, MemoryRows, SourceData
from pfedmoe_mpi.data.sources import arrow_file
from pfedmoe_mpi.data.sources.client_parts import keep_clients
from pfedmoe_mpi.data.sources.csv_table import CsvTable, open_csv
from pfedmoe_mpi.data.sources.features import Standardise, to_columns
from pfedmoe_mpi.data.sources.folder import describe_conversions, read_images
from pfedmoe_mpi.data.sources.numbering import as_number
from pfedmoe_mpi.data.sources.official_parts import role, unread_validation
from pfedmoe_mpi.data.sources.table_column import CODES, Column, Images, Keys, Place
from pfedmoe_mpi.data.sources.table_columns import Columns, choose_columns, class_names
from pfedmoe_mpi.data.sources.table_files import find_files
from pfedmoe_mpi.data.sources.tokens import read_texts
from pfedmoe_mpi.errors import DataError

_VALUES = 1 << 28  # of all columns and rows together, once codes have columns of their own


def load_table(path: Path, settings: Data) -> SourceData:
    """Read every row into memory: images, tokens, or (n, columns) float32, NaN where a value is missing.

    Raises:
        DataError: not a table, a column that does not exist, a row without a label or an image, or a column
            of numbers in which something else stands; names file and line.
    """
    files = find_files(path, settings.source)
    first = _open(files.train[0])
    columns = choose_columns(str(first.path), first.names, settings, first.features)
    table = _Rows(str(path), Place(first.unit), columns, settings)
    several = len(files.train) + len(files.test) > 1
    for paths, test in ((files.train, False), (files.test, True)):
        for each in paths:
            file = first if each == first.path else _open(each)
            _check_same(first, file, columns)
            table.place.file = each.name if several else ""
            table.read(file, test)
    return _source(path, settings, table, class_names(first.features, columns.label), files.left_out)


def _open(path: Path) -> CsvTable | arrow_file.ArrowFile:
    arrow = path.suffix.lower() in arrow_file.PARQUET | arrow_file.STREAM
    return arrow_file.open_arrow(path) if arrow else open_csv(path)


def _check_same(first: Any, file: Any, columns: Columns) -> None:
    """Refuse a file that lacks a column of the first one, or declares other classes."""
    lacking = next((name for name in columns.read if name not in file.names), None)
    if lacking is not None:
        raise DataError(
            f"{file.path} has no column '{lacking}', which {first.path} has",
            "give all files the same columns, or move the file away",
        )
    if class_names(file.features, columns.label) != class_names(first.features, columns.label):
        raise DataError(f"{file.path} and {first.path} declare unlike classes", "write both files again")


@dataclass(eq=False)
class _Rows:
    """The rows of all files, column by column."""

    where: str
    place: Place
    columns: Columns
    settings: Data
    official: list[bool] = field(default_factory=list)
    unread: int = 0  # rows of a validation part
    texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.labels = Keys(f"{self.where}: label", self.place)
        self.clients = Keys(f"{self.where}: client", self.place)
        self.images = Images(self.columns.image, self.where, self.place)
        self.features = {
            name: Column(name, self.where, self.place, coded=name in self.settings.categorical)
            for name in self.columns.features
        }

    def read(self, file: CsvTable | arrow_file.ArrowFile, test: bool) -> None:
        """Add the rows of one file, which are test rows or not unless a column says so."""
        wanted, texts = self.columns.read, [*self.columns.text]
        self.images.folder = file.path.parent
        keys: dict[str, Any] = {self.columns.label: self.labels, self.columns.client: self.clients}
        keys |= {self.columns.image: self.images, **self.features}
        adders = [(k, keys[name]) for k, name in enumerate(wanted) if name in keys]
        text_places = [wanted.index(name) for name in texts]
        split = wanted.index(self.columns.split) if self.columns.split else -1
        for number, values in file.rows(wanted, self.columns.image):
            self.place.number = number
            part = self._part(values[split]) if self.columns.split else "test" if test else "train"
            if part == "validation":
                self.unread += 1
                continue
            self.official.append(part == "test")
            for k, column in adders:
                column.add(values[k])
            if text_places:
                self.texts.append(" ".join(str(values[k]) for k in text_places if values[k] is not None))

    def _part(self, value: Any) -> str:
        found = role(value) if isinstance(value, str) else ""
        if not found:
            raise DataError(
                f"{self.where}: data.split = {self.columns.split} is {value!a} in {self.place}, and parts "
                "are train, test and validation",
                "write train or test into the row, or remove --data.split",
            )
        return found


@dataclass(frozen=True)
class _Samples:
    """What the samples of a table are once its columns are read."""

    x: np.ndarray
    settings: dict[str, Any]  # of the SourceData
    left_out: dict[str, str] = field(default_factory=dict)  # columns


def _source(
    path: Path, settings: Data, table: _Rows, declared: tuple[str, ...], left_out: tuple[str, ...]
) -> SourceData:
    if not len(table.labels):
        raise DataError(f"{path} has no row below its header", "add rows")
    y, names = table.labels.numbered(declared)
    if not declared:
        _check_classes(path, table.columns.label, names)
    if all(table.official):
        raise DataError(f"{path} has no training row", "write train into rows, or remove --data.split")
    official = np.array(table.official) if any(table.official) else None
    if table.unread:
        tested = official is not None
        left_out = (*left_out, unread_validation(f"{table.unread:,} validation rows", tested=tested))
    samples = _samples(path, settings, table)
    columns = {**table.columns.left_out, **samples.left_out}
    source = SourceData(
        name=path.stem or path.resolve().name,
        where=str(path),
        store=MemoryRows(samples.x),
        labels=y,
        class_names=names,
        official_test=official,
        left_out=(*(f"column '{name}': {reason}" for name, reason in columns.items()), *left_out),
        **samples.settings,
    )
    absent = [name for name in declared if name not in names]
    if absent:
        text = f"{len(absent)} declared classes without a row, such as {absent[0]}"
        source = replace(source, left_out=(*source.left_out, text))
    return _with_clients(source, samples.x, *table.clients.numbered()) if table.columns.client else source


def _with_clients(source: SourceData, x: np.ndarray, owner: np.ndarray, names: tuple[str, ...]) -> SourceData:
    """Return the rows of clients with enough rows, and the classes that they have."""
    kept, clients = keep_clients(owner, names, source.official_test, source.where)
    classes, labels = np.unique(source.labels[kept], return_inverse=True)
    return replace(
        source,
        store=MemoryRows(x[kept]),
        labels=labels,
        class_names=tuple(source.class_names[place] for place in classes),
        client=clients.client,
        client_names=clients.names,
        official_test=clients.official_test,
        proposals={**source.proposals, **clients.proposals},
        files=[file for file, keep in zip(source.files, kept, strict=True) if keep] if source.files else (),
        left_out=(*source.left_out, *clients.left_out),
    )


def _samples(path: Path, settings: Data, table: _Rows) -> _Samples:
    """Return the images, the texts or the features."""
    if table.columns.image:
        files = table.images.files
        x, conversions = read_images(files, settings.size)
        coloured = x.shape[1] == 3
        constants = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if coloured else {}
        return _Samples(
            x, {**constants, "files": files, "warnings": tuple(describe_conversions(files, conversions))}
        )
    if table.columns.text:
        x, fit, warnings = read_texts(table.texts, settings, str(path))
        return _Samples(x, {"fit": fit, "warnings": warnings, "proposals": {"rounds": 12}})
    attributes, left_out = {}, {}
    for name, column in table.features.items():
        column.check()
        reason = column.useless()
        if reason:
            left_out[name] = reason
        else:
            attributes[name] = column.attribute()
    x = _columns(path, attributes, len(table.labels), left_out)
    standardise = Standardise(tuple(len(codes) for _, codes in attributes.values()), learn=True)
    return _Samples(x, {"fit": standardise}, left_out)


def _check_classes(path: Path, label: str, names: Sequence[str]) -> None:
    """Refuse a label column of measurements, which are not classes."""
    fraction = next((name for name in names if isinstance(as_number(name), float)), None)
    if fraction is not None:
        raise DataError(
            f"data.label = {label}: {path} has {len(names)} different numbers there, such as {fraction}, and "
            "labels are names or whole numbers",
            "name a column of classes, or replace the numbers by the class they belong to",
        )


def _columns(
    path: Path, attributes: dict[str, tuple[np.ndarray, range]], rows: int, left_out: dict[str, str]
) -> np.ndarray:
    """Return the features (n, columns); refuse a table without any, or with more than memory should hold."""
    if not attributes:
        text = next((name for name, reason in left_out.items() if reason.endswith("texts")), None)
        raise DataError(
            f"{path} has no feature beside its label",
            f"--data.text '{text}' reads its texts" if text else "add columns, or shorten --data.ignore",
        )
    total = rows * sum(max(1, len(codes)) for _, codes in attributes.values())
    if total > _VALUES:
        widest = max(attributes, key=lambda name: len(attributes[name][1]))
        raise DataError(
            f"{path}: {rows:,} rows with a column per code are {total:,} values, more than {_VALUES:,}; "
            f"'{widest}' has {len(attributes[widest][1])} of at most {CODES} codes",
            f"leave it out: --data.ignore '{widest}'",
        )
    return to_columns([*attributes.values()])
