"""Datasets of HDF5 files that do not unpack to far more than their file."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import h5py

from pfedmoe_mpi.errors import DataError
from pfedmoe_mpi.storage import untrusted_hdf5
from pfedmoe_mpi.storage.untrusted_json import UnusableError

_FREE, _RATIO = 64 << 20, 100  # a file may unpack to _FREE bytes plus _RATIO times its own length
_UNPACKED = 256 << 20  # bytes; a chunk that could unpack to more is first unpacked piece by piece
_PACKED = {h5py.h5z.FILTER_DEFLATE: 1032, h5py.h5z.FILTER_LZF: 90}  # highest ratio of each compression
_REPACK = "unpack it first: h5repack -f NONE FILE NEW_FILE"


def most_unpacked(path: Path) -> int:
    """Return the bytes that a file of this length may unpack to."""
    return _FREE + _RATIO * path.stat().st_size


def find_table(file: Any, name: str, path: Path, layout: str) -> Any:
    """Return a dataset stored in the file itself that unpacks to a plausible size.

    Args:
        layout: the remedy for a file without it.

    Raises:
        DataError: no such dataset, a size that the file's length cannot justify, or unsupported filters.
    """
    table = untrusted_hdf5.find_dataset(file, name)
    if table is None:
        names = ", ".join(ascii(key).strip("'") for key, _ in zip(file, range(8), strict=False))
        raise DataError(f"{path} has no dataset '{name}'; it has {names or 'nothing'}", layout)
    limit = most_unpacked(path)
    unpacked = max(math.prod(shape) for shape in (table.shape, table.chunks or ()))
    if unpacked * table.dtype.itemsize > limit:
        raise DataError(
            f"{name} of {path} claims {unpacked * table.dtype.itemsize:,} bytes in shape {table.shape}, "
            f"more than {_RATIO} times the file and {_FREE >> 20} MiB",
            _REPACK,
        )
    _check_filters(table, name, path)
    return table


def _filters(table: Any) -> list[int]:
    """Return the codes of the HDF5 filters of a dataset."""
    plan = table.id.get_create_plist()
    return [plan.get_filter(number)[0] for number in range(plan.get_nfilters())]


def _check_filters(table: Any, name: str, path: Path) -> None:
    """Allow one compression, gzip or lzf: with other filters the file decides how much memory they take."""
    allowed = {*_PACKED, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
    used = _filters(table)
    if not {*used} <= allowed or len({*used}) < len(used) or {*used} >= {*_PACKED}:
        raise DataError(
            f"{name} of {path} uses HDF5 filters {used}; gzip, lzf, shuffle and fletcher32 are supported",
            _REPACK,
        )


def check_chunks(table: Any, where: str) -> None:
    """Refuse chunks that unpack to more than their declared size, before HDF5 allocates the memory."""
    packed = {*_filters(table)} & {*_PACKED}
    if not packed:
        return
    length = math.prod(table.chunks) * table.dtype.itemsize + 4  # plus 4: a checksum may be packed with it
    suspects: list[tuple[int, ...]] = []

    def add_suspect(chunk: Any) -> None:
        if chunk.size * _PACKED[min(packed)] > max(_UNPACKED, length):
            suspects.append(chunk.chunk_offset)

    table.id.chunk_iter(add_suspect)
    for offset in suspects:
        skipped, raw = table.id.read_direct_chunk(offset)
        if packed == {h5py.h5z.FILTER_LZF} or (not skipped and _unpacked_length(raw, length) > length):
            raise DataError(
                f"{where}: the chunk at {offset} could unpack to more than its declared size", _REPACK
            )


def _unpacked_length(raw: bytes, most: int) -> int:
    """Return the unpacked length of these gzip bytes; stop counting a little above `most`."""
    unpacker, count = zlib.decompressobj(), 0
    try:
        while raw and not unpacker.eof and count <= most:
            count += len(unpacker.decompress(raw, 1 << 20))
            raw = unpacker.unconsumed_tail
    except zlib.error as error:
        raise UnusableError(f"a chunk cannot be unpacked: {error}") from error
    return count
