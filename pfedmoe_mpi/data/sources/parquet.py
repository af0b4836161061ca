"""Parquet files row by row, through pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pfedmoe_mpi.errors import DataError

SUFFIXES = {".parquet", ".pq"}
_FREE, _RATIO = 64 << 20, 100  # a file may unpack to _FREE bytes plus _RATIO times its own length
_BATCH = 1 << 13  # rows in memory at once
_CELL = 8  # bytes of a value


def read_parquet(path: Path) -> tuple[list[str], Iterator[tuple[int, Sequence[Any]]]]:
    """Return the column names, and the rows with their numbers from 1: numbers, texts, or None if missing.

    Raises:
        DataError: pyarrow is missing, the file is damaged or claims far more than its length, or a column is
            neither numbers nor texts.
    """
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise DataError(
            f"reading {path} needs pyarrow", "pip install 'pfedmoe_mpi[tables]', or save it as CSV"
        ) from error
    try:
        texts = [
            name
            for name, kind in zip(*_schema(parquet.read_schema(path)), strict=True)
            if arrow.types.is_string(kind) or arrow.types.is_large_string(kind)
        ]
        # Texts stay numbers into a dictionary, so a long text that many rows repeat is in memory once.
        file = parquet.ParquetFile(path, read_dictionary=texts, memory_map=False)
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    names, kinds = _schema(file.schema_arrow)
    _check_size(path, file.metadata)
    for name, kind in zip(names, kinds, strict=True):
        _check_kind(path, name, kind)
    return names, _rows(path, file)


def _schema(schema: Any) -> tuple[list[str], list[Any]]:
    return list(schema.names), list(schema.types)


def _check_size(path: Path, metadata: Any) -> None:
    """Refuse a file that claims far more values or bytes than its length can justify."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    claimed = max(
        metadata.num_rows * metadata.num_columns * _CELL, sum(abs(group.total_byte_size) for group in groups)
    )
    if claimed > _FREE + _RATIO * path.stat().st_size:
        raise DataError(
            f"{path} claims {claimed:,} bytes, more than {_RATIO} times the file and {_FREE >> 20} MiB",
            "write it again without compression",
        )


def _check_kind(path: Path, name: str, kind: Any) -> None:
    """Refuse a column of dates, lists, bytes and the like."""
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    numbers = (types.is_boolean, types.is_integer, types.is_floating, types.is_decimal, types.is_null)
    if not any(is_kind(value) for is_kind in (*numbers, types.is_string, types.is_large_string)):
        raise DataError(
            f"{path}: column '{name}' is {value}, and columns are numbers or texts",
            "convert the column to a number or a text, or remove it from the file",
        )


def _rows(path: Path, file: Any) -> Iterator[tuple[int, Sequence[Any]]]:
    """Yield every row with its number; a batch of rows is in memory at once."""
    import pyarrow as arrow

    number = 1
    try:
        for batch in file.iter_batches(_BATCH):
            batch.validate(full=True)  # a damaged file may number words that its dictionary lacks
            for row in zip(*map(_values, batch.columns), strict=True):
                yield number, row
                number += 1
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    finally:
        file.close()


def _values(column: Any) -> list[Any]:
    """Return a column's values as Python objects; equal texts of a dictionary are one object."""
    import pyarrow as arrow

    if not arrow.types.is_dictionary(column.type):
        values: list[Any] = column.to_pylist()
        return values
    words = column.dictionary.to_pylist()
    return [None if place is None else words[place] for place in column.indices.to_pylist()]


def _unreadable(path: Path, error: BaseException) -> DataError:
    return DataError(f"{path} cannot be read as Parquet: {error}", "copy the file again, or write it again")
