"""Text classification: a CSV file with the label in the first column and the text in the others."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.dataset import MemoryRows, SourceData
from pfedmoe_mpi.data.sources.text_file import read_text
from pfedmoe_mpi.data.sources.tokens import Vocabulary, number_words, pad, split_words, unspaced
from pfedmoe_mpi.errors import DataError

_NAMES = "classes.txt"


def load_text(path: Path, settings: Data) -> SourceData:
    """Read every row as the numbers of its first `data.length` words, (n, length) int32.

    The text is all columns after the label, joined by spaces. Labels are names or numbers. If a
    `classes.txt` lies beside the file, one name per line, labels are these names or their numbers from 1 (as
    in AG News).

    Raises:
        DataError: not CSV, a row without a text, or an unknown label; names file and line.
    """
    lines, labels, texts = zip(*_records(path), strict=True)
    classes, names = _classes(path, labels)
    for line, label in zip(lines, labels, strict=True):
        if label not in classes:
            raise DataError(
                f"{path}, line {line}: unknown label '{label}'",
                f"the first column must be one of {', '.join(names[:10])}, or its number from 1; "
                "remove a header line",
            )
    rows, words = number_words([split_words(text) for text in texts])
    return SourceData(
        name=path.stem,
        where=str(path),
        store=MemoryRows(pad(rows, settings.length)),
        labels=np.array([classes[label] for label in labels], np.int64),
        class_names=names,
        proposals={"rounds": 12},
        fit=Vocabulary(len(words), settings.vocabulary),
        warnings=unspaced(words, str(path)),
    )


def _records(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (first line, label, text) of every row."""
    content = read_text(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(content)))  # a text may be a book
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    line = 1
    try:
        for record in reader:
            if len(record) == 1:
                raise DataError(
                    f"{path}, line {line}: one column, expected a label and a text",
                    'give rows such as "3","Title","Text"',
                )
            if record:
                yield line, record[0].strip(), " ".join(record[1:])
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line} is not CSV: {error}",
            'quote a text that holds commas or line breaks, and double the quotes inside it: ""',
        ) from error


def _classes(path: Path, labels: Sequence[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the class of every possible label, and the class names."""
    named = path.with_name(_NAMES)
    if named.exists():
        names = tuple(line.strip() for line in read_text(named).splitlines() if line.strip())
        return {**{str(k): k - 1 for k in range(1, len(names) + 1)}, **_places(names)}, names
    numeric = _is_number(labels[-1])  # of the last row, because the first may be a header
    if not numeric and labels.count(labels[0]) == 1:
        raise DataError(
            f"{path}: no other row has the first row's label '{labels[0]}'",
            "remove a header line, or give the class more rows",
        )
    same_kind = {label for label in labels if _is_number(label) == numeric}
    names = tuple(sorted(sorted(same_kind), key=int) if numeric else sorted(same_kind))
    return _places(names), names


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


def _places(names: Sequence[str]) -> dict[str, int]:
    return {name: place for place, name in enumerate(names)}
