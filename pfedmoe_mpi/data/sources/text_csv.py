"""Texts to classify: a CSV file, the label in the first column, the text in the others."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.dataset import HeldRows, Loaded
from pfedmoe_mpi.data.sources.text_file import text_of
from pfedmoe_mpi.data.sources.tokens import Vocabulary, numbered, padded, words_of
from pfedmoe_mpi.errors import DataError

_NAMES = "classes.txt"


def load_text(path: Path, settings: Data) -> Loaded:
    """Every row as the numbers of its first `data.length` words, (n, length) int32; columns are joined.

    Labels are names, or numbers: with a `classes.txt` beside the file, one name per line, they are its names
    or their numbers from 1 (as in AG News).

    Raises:
        DataError: not CSV, a row without a text, a label that is not known; names file and line.
    """
    lines, labels, texts = zip(*_records(path), strict=True)
    known, names = _classes(path, labels)
    for line, label in zip(lines, labels, strict=True):
        if label not in known:
            raise DataError(
                f"{path}, line {line}: label '{label}' is not known",
                f"the first column is one of {', '.join(names[:10])}, or its number from 1; "
                "remove a line of headings",
            )
    rows, words = numbered([words_of(text) for text in texts])
    return Loaded(
        name=path.stem,
        where=str(path),
        store=HeldRows(padded(rows, settings.length)),
        labels=np.array([known[label] for label in labels], np.int64),
        class_names=names,
        proposals={"rounds": 12},
        fit=Vocabulary(len(words), settings.vocabulary),
    )


def _records(path: Path) -> Iterator[tuple[int, str, str]]:
    """The line where it begins, label and text of every row."""
    content = text_of(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(content)))  # a text may be a book
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    line = 1
    try:
        for record in reader:
            if len(record) == 1:
                raise DataError(
                    f"{path}, line {line}: a label and a text are expected, not one column",
                    'give rows such as "3","Title","Text"',
                )
            if record:
                yield line, record[0].strip(), " ".join(record[1:])
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line}: not CSV: {error}",
            'put a text that holds commas or line breaks in quotes, and write its own quotes twice: ""',
        ) from error


def _classes(path: Path, labels: Sequence[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """The class of every label that may stand in the file, and the names of the classes."""
    named = path.with_name(_NAMES)
    if named.exists():
        names = tuple(line.strip() for line in text_of(named).splitlines() if line.strip())
        return {**{str(k): k - 1 for k in range(1, len(names) + 1)}, **_places(names)}, names
    numbers = _is_number(labels[-1])
    if not numbers and labels.count(labels[0]) == 1:
        raise DataError(
            f"{path}: the first row's label '{labels[0]}' stands in no other row",
            "remove a line of headings, or give the class more rows",
        )
    found = {label for label in labels if _is_number(label) == numbers}
    names = tuple(sorted(sorted(found), key=int) if numbers else sorted(found))
    return _places(names), names


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


def _places(names: Sequence[str]) -> dict[str, int]:
    return {name: place for place, name in enumerate(names)}
