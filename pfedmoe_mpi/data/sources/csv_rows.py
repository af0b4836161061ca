"""CSV files row by row: bounded rows, and one error that names the line of what is not CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from pfedmoe_mpi.data.sources.text_file import read_lines
from pfedmoe_mpi.errors import DataError

_LONGEST = 1 << 24  # characters of a row


def read_rows(path: Path, separator: str, too_long: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, values) of every row that is not empty; only one row at a time is in memory.

    Args:
        too_long: the remedy for a row that is too long.

    Raises:
        DataError: the file cannot be read, or is not CSV in UTF-8; names the line.
    """
    line, length = 1, 0  # where the row begins, and its characters so far

    def lines() -> Iterator[str]:
        nonlocal length
        for part in read_lines(path, _LONGEST):
            length += len(part)
            if length > _LONGEST:
                problem = f"{path}, line {line}: this row has more than {_LONGEST:,} characters"
                raise DataError(problem, too_long)
            yield part

    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST))
    reader = csv.reader(lines(), delimiter=separator, strict=True)
    try:
        for record in reader:
            if record:
                yield line, record
            line, length = reader.line_num + 1, 0
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line} is not CSV: {error}",
            'quote a text that holds commas or line breaks, and double the quotes inside it: ""',
        ) from error
