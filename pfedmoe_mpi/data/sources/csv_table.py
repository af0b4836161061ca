"""CSV and TSV files with a header line, as the rows of chosen columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pfedmoe_mpi.data.sources.csv_rows import read_rows
from pfedmoe_mpi.errors import DataError

_MARKS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}
_TOO_LONG = "close a quote that is left open, or shorten the text"


@dataclass(frozen=True)
class CsvTable:
    """An opened file: the names of its columns; a text file declares nothing more of them."""

    path: Path
    names: list[str]
    separator: str
    features: Mapping[str, Any] = field(default_factory=dict)
    unit = "line"

    def rows(self, columns: Sequence[str], image: str) -> Iterator[tuple[int, Sequence[Any]]]:
        """Yield the values of these columns of every row, with its line.

        Raises:
            DataError: not CSV, or a row that has more or fewer values than the header.
        """
        places = [self.names.index(name) for name in columns]
        records = read_rows(self.path, self.separator, _TOO_LONG)
        next(records)
        for line, record in records:
            if len(record) != len(self.names):
                raise DataError(
                    f"{self.path}, line {line} has {len(record)} values, and the header names "
                    f"{len(self.names)} columns",
                    "give each column a value, or nothing between two separators; quote values that contain "
                    "them",
                )
            yield line, [record[place] for place in places]


def open_csv(path: Path) -> CsvTable:
    """Open a file and read its first line.

    Raises:
        DataError: an empty file, or columns that are separated otherwise than the file's name says.
    """
    separator = "\t" if path.suffix.lower() in {".tsv", ".tab"} else ","
    _, header = next(read_rows(path, separator, _TOO_LONG), (0, None))
    if header is None:
        raise DataError(f"{path} is empty", "add a line of column names, and rows")
    names = [name.strip() for name in header]
    if len(names) == 1:
        marks = [mark for mark in _MARKS if mark in names[0] and mark != separator]
        found = f", and the line has {_MARKS[marks[0]]}" if marks else ""
        raise DataError(
            f"{path} has one column in its first line; {_MARKS.get(separator, 'commas')} separate the "
            f"columns of a {path.suffix or 'text'} file{found}",
            "save it as .csv with commas or as .tsv with tabs, with column names in the first line",
        )
    return CsvTable(path, names, separator)
