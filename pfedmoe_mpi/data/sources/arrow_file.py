"""Parquet files and Arrow streams row by row, through pyarrow: tables, and data sets of Hugging Face."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfedmoe_mpi.errors import DataError
from pfedmoe_mpi.storage.untrusted_json import UnusableError, parse

PARQUET, STREAM = {".parquet", ".pq"}, {".arrow"}
_FREE, _RATIO = 64 << 20, 100  # a file may unpack to _FREE bytes plus _RATIO times its own length
_BATCH, _IMAGES = 1 << 13, 1 << 8  # rows in memory at once
_CELL = 8  # bytes of a value
_AGAIN = "copy the file again, or write it again"


@dataclass(frozen=True)
class ArrowFile:
    """An opened file: the names of its columns, and what Hugging Face's library notes of each."""

    path: Path
    names: list[str]
    features: Mapping[str, Any]
    unit = "row"

    def rows(self, columns: Sequence[str], image: str) -> Iterator[tuple[int, Sequence[Any]]]:
        """Yield every row of these columns with its number from 1: numbers, texts, or None if missing.

        Values of the column `image` may also be bytes, or a dict of bytes and path.

        Raises:
            DataError: the file is damaged or unpacks to far more than its length, or a column is neither
                numbers nor texts.
        """
        import pyarrow as arrow

        read = _parquet_batches if self.path.suffix.lower() in PARQUET else _stream_batches
        number = 1
        try:
            for batch in read(self.path, columns, _IMAGES if image else _BATCH):
                _check_claim(self.path, batch.num_rows * len(columns) * _CELL)
                for name, kind in zip(columns, batch.schema.types, strict=True):
                    _check_kind(self.path, name, kind, image=name == image)
                batch.validate(full=True)  # a damaged file may number words that its dictionary lacks
                for row in zip(*map(_values, batch.columns), strict=True):
                    yield number, row
                    number += 1
        except (arrow.ArrowException, OSError, ValueError) as error:
            raise _unreadable(self.path, error) from error


def open_arrow(path: Path) -> ArrowFile:
    """Open a file and read its schema.

    Raises:
        DataError: pyarrow is missing, or the file is damaged.
    """
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        extra = "hf" if path.suffix.lower() in STREAM else "tables"
        raise DataError(
            f"reading {path} needs pyarrow", f"pip install 'pfedmoe_mpi[{extra}]', or save it as CSV"
        ) from error
    try:
        if path.suffix.lower() in PARQUET:
            schema = parquet.read_schema(path)
        else:
            with arrow.OSFile(str(path)) as file:
                schema = arrow.ipc.read_schema(file)
        return ArrowFile(path, list(schema.names), _features(path, schema.metadata or {}))
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _features(path: Path, metadata: Mapping[bytes, bytes]) -> Mapping[str, Any]:
    """Return what Hugging Face's library notes of every column: a dict with `_type` and perhaps `names`."""
    try:
        noted = parse(metadata.get(b"huggingface", b"{}").decode(), str(path))
    except (UnusableError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    for name in ("info", "features"):
        noted = noted.get(name) if isinstance(noted, dict) else None
    return {k: v for k, v in noted.items() if isinstance(v, dict)} if isinstance(noted, dict) else {}


def _parquet_batches(path: Path, columns: Sequence[str], rows: int) -> Iterator[Any]:
    from pyarrow import parquet, types

    schema = parquet.read_schema(path)
    # Texts stay numbers into a dictionary, so a long text that many rows repeat is in memory once.
    texts = [
        name
        for name, kind in zip(schema.names, schema.types, strict=True)
        if types.is_string(kind) or types.is_large_string(kind)
    ]
    with parquet.ParquetFile(path, read_dictionary=texts, memory_map=False) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        _check_claim(path, file.metadata.num_rows * file.metadata.num_columns * _CELL)
        _check_claim(path, sum(abs(group.total_byte_size) for group in groups))
        for batch in file.iter_batches(rows, columns=list(columns)):
            yield batch.select(columns)


def _stream_batches(path: Path, columns: Sequence[str], rows: int) -> Iterator[Any]:
    """Yield the batches of an Arrow stream, at most `rows` rows at once, as `datasets` writes them."""
    import pyarrow as arrow

    with arrow.OSFile(str(path)) as file:
        schema = arrow.ipc.read_schema(file)
        for message in arrow.ipc.MessageReader.open_stream(file):
            if message.type != "record batch" or _is_compressed(message.metadata.to_pybytes()):
                raise DataError(
                    f"{path} holds a {message.type} that is compressed or that `datasets` does not write",
                    "write it again: datasets.load_from_disk(FOLDER).save_to_disk(NEW_FOLDER)",
                )
            batch = arrow.ipc.read_record_batch(message, schema).select(columns)
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows)


def _is_compressed(metadata: bytes) -> bool:
    """Return whether a record batch is compressed, which decides how much memory reading it takes.

    Arrow's Message.fbs: slot 2 of a message is its header, and slot 3 of a record batch its compression.
    """

    def slot(table: int, number: int) -> int:
        """Return the position of a field of a FlatBuffers table, 0 if the field is absent."""
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        size = struct.unpack_from("<H", metadata, vtable)[0]
        place = 4 + 2 * number
        offset = struct.unpack_from("<H", metadata, vtable + place)[0] if place < size else 0
        return table + offset if offset else 0

    try:
        header = slot(struct.unpack_from("<I", metadata)[0], 2)
        return bool(slot(header + struct.unpack_from("<I", metadata, header)[0], 3))
    except struct.error as error:
        raise ValueError("a damaged record batch") from error


def _check_claim(path: Path, claimed: int) -> None:
    """Refuse a file that claims far more values or bytes than its length can justify."""
    if claimed > _FREE + _RATIO * path.stat().st_size:
        raise DataError(
            f"{path} claims {claimed:,} bytes, more than {_RATIO} times the file and {_FREE >> 20} MiB",
            "write it again without compression",
        )


def _check_kind(path: Path, name: str, kind: Any, *, image: bool) -> None:
    """Refuse a column of dates, lists, bytes and the like, unless it holds images."""
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    texts = (types.is_string, types.is_large_string)
    numbers = (types.is_boolean, types.is_integer, types.is_floating, types.is_decimal, types.is_null)
    pictures = (types.is_binary, types.is_large_binary, types.is_struct)
    if any(is_kind(value) for is_kind in (*texts, *(pictures if image else numbers))):
        return
    expected = "images are bytes, or names of files" if image else "columns are numbers or texts"
    raise DataError(
        f"{path}: column '{name}' is {value}, and {expected}",
        "convert the column" if image else f"convert it to a number or a text, or --data.ignore '{name}'",
    )


def _values(column: Any) -> list[Any]:
    """Return a column's values as Python objects; equal texts of a dictionary are one object."""
    import pyarrow as arrow

    if not arrow.types.is_dictionary(column.type):
        values: list[Any] = column.to_pylist()
        return values
    words = column.dictionary.to_pylist()
    return [None if place is None else words[place] for place in column.indices.to_pylist()]


def _unreadable(path: Path, error: BaseException) -> DataError:
    kind = "Parquet" if path.suffix.lower() in PARQUET else "an Arrow stream"
    return DataError(f"{path} cannot be read as {kind}: {error}", _AGAIN)
