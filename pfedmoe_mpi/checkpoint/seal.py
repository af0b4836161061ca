"""The seal of a checkpoint: its user block names every dataset with bytes and covers every byte.

The user block consists of a header, one entry per dataset with bytes, their names, the SHA-256 of all other
bytes after the user block (HDF5's own structure), zeros, and in its last 32 bytes the SHA-256 of all this.
Its length follows from the header, so that no byte of the file is left out. It is read with plain reads,
before the HDF5 library opens the file. Anyone can compute a seal: it detects damage, but not who wrote the
file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

from pfedmoe_mpi.errors import CheckpointError

FORMAT = 3
EARLIER = (2,)  # formats that can be read, too: in 2 every client has a vector
ALIGN = 4096
REMEDY = "use another checkpoint of the run; `restart RUN_DIR` resumes from the newest good one"
STRUCTURE = "HDF5's own structure"
_MAGIC = b"pfedmoe\x00"
_VERSION = struct.Struct("<8sI")
_HEADER = struct.Struct("<8sIIQQ")  # magic, format, entries, bytes of their names, length of the file
_RANGE = struct.Struct("<QQ32s")  # offset, length, SHA-256
_PIECE = 1 << 24

Table = Mapping[str, tuple[int, int]]  # offset and length in bytes of every dataset with bytes


@dataclass(frozen=True)
class Range:
    """The bytes of one dataset."""

    name: str
    offset: int
    length: int
    digest: bytes

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True)
class Seal:
    """The content of a user block: `start` is its length, `rest` the digest of bytes in no range.

    `digest` is that of the block itself, which covers the whole file.
    """

    start: int
    length: int
    ranges: tuple[Range, ...]
    rest: bytes
    digest: bytes = b""

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of the pieces of HDF5's own structure."""
        at = self.start
        for one in self.ranges:
            yield at, one.offset - at
            at = one.end
        yield at, self.length - at


def block_length(names: Sequence[str]) -> int:
    """Return the length of the user block: a power of two with space for the seal."""
    return _block_length(len(names), len(_joined(names)))


def _block_length(entries: int, names_length: int) -> int:
    needed = _HEADER.size + entries * _RANGE.size + names_length + 64
    return max(ALIGN, 1 << (needed - 1).bit_length())


def _joined(names: Sequence[str]) -> bytes:
    return "\n".join(names).encode()


# Writing


def put(file: Any, table: Table, digests: Mapping[str, bytes]) -> None:
    """Seal an open file; `digests` are those of datasets that other ranks have written and hashed."""
    length = file.seek(0, os.SEEK_END)
    ranges = []
    for name, (offset, size) in sorted(table.items(), key=lambda item: item[1]):
        digest = digests[name] if name in digests else _digest(file, [(offset, size)])
        ranges.append(Range(name, offset, size, digest))
    names = [one.name for one in ranges]
    start, joined = block_length(names), _joined(names)
    rest = _digest(file, Seal(start, length, tuple(ranges), b"").gaps())
    header = _HEADER.pack(_MAGIC, FORMAT, len(ranges), len(joined), length)
    entries = b"".join(_RANGE.pack(one.offset, one.length, one.digest) for one in ranges)
    block = (header + entries + joined + rest).ljust(start - 32, b"\0")
    file.seek(0)
    file.write(block + sha256(block).digest())


def _digest(file: Any, places: Iterator[tuple[int, int]] | Sequence[tuple[int, int]]) -> bytes:
    """Return SHA-256 of several pieces of a file, one after the other.

    Raises:
        EOFError: the file ends within a piece.
    """
    state = sha256()
    for offset, length in places:
        file.seek(offset)
        while length > 0:
            piece = file.read(min(_PIECE, length))
            if not piece:
                raise EOFError
            state.update(piece)
            length -= len(piece)
    return bytes(state.digest())


# Reading


def check(file: Any, seal: Seal, path: Path, rank: int = 0, ranks: int = 1) -> None:
    """Compare this rank's share of the file with its seal: the ranks share the clients, rank 0 does the rest.

    Raises:
        CheckpointError: bytes have changed; the message names the dataset.
    """
    for number, one in enumerate(seal.ranges):
        is_own = number % ranks == rank if one.name.startswith("clients/") else rank == 0
        if is_own and _digest(file, [(one.offset, one.length)]) != one.digest:
            raise CheckpointError(f"{path} is damaged: the bytes of {one.name} have changed", REMEDY)
    if rank == 0 and _digest(file, seal.gaps()) != seal.rest:
        raise CheckpointError(f"{path} is damaged: {STRUCTURE} has changed", REMEDY)


def without_waiting(path: str, flags: int) -> int:
    """Open a file for `open`, and do not wait if it is a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


@contextmanager
def errors(path: Path) -> Iterator[None]:
    """Turn the system's errors in the block into CheckpointError."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}", "check the path") from error
    except IsADirectoryError as error:
        best = path / "checkpoints" / "best.h5"
        problem = f"{path} is a folder, not a checkpoint"
        raise CheckpointError(problem, f"name a checkpoint, such as {best}") from error
    except (OSError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read: {error or 'it ends early'}", REMEDY) from error


def read(file: Any, path: Path) -> Seal:
    """Return the seal of an open file; the bytes after the user block are not read.

    Raises:
        CheckpointError: the file is not a checkpoint, unfinished, of another format version, truncated or too
            long, or its seal does not match itself.
    """
    length = os.fstat(file.fileno()).st_size
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise CheckpointError(f"{path} is not a finished checkpoint of this program", REMEDY)
    version = _VERSION.unpack_from(header)[1]
    if version not in (FORMAT, *EARLIER):
        problem = f"{path} has format version {version}, this program reads {FORMAT}"
        raise CheckpointError(problem, "use the version of this program that wrote it")
    _, _, count, names_length, expected = _HEADER.unpack(header)
    start = _block_length(count, names_length)
    block = header + file.read(start - len(header)) if start <= length else header
    if len(block) < start or sha256(block[:-32]).digest() != block[-32:]:
        if length < start and length < expected:
            problem = f"{path} is truncated: {length} of {expected} bytes, and its seal is incomplete"
        else:
            problem = f"{path} is damaged: its seal does not match"
        raise CheckpointError(problem, REMEDY)
    seal = _parse(block, count, names_length, expected)
    if seal is None:
        raise CheckpointError(
            f"{path} is not a checkpoint of this program: its seal contradicts itself", REMEDY
        )
    if length < expected:
        cut = next((one.name for one in seal.ranges if one.end > length), STRUCTURE)
        problem = f"{path} is truncated: {length} of {expected} bytes; the first incomplete part is {cut}"
        raise CheckpointError(problem, REMEDY)
    if length > expected:
        raise CheckpointError(f"{path} is too long: {length} of {expected} bytes", REMEDY)
    return seal


def _parse(block: bytes, count: int, names_length: int, length: int) -> Seal | None:
    """Return the seal of a user block; None if it contradicts itself, which this program never writes."""
    table = _HEADER.size + count * _RANGE.size
    names = block[table : table + names_length].decode(errors="replace").split("\n") if count else []
    if len(names) != count or len({*names}) != count:
        return None
    entries = _RANGE.iter_unpack(block[_HEADER.size : table])
    ranges = tuple(Range(name, *entry) for name, entry in zip(names, entries, strict=True))
    ends = [len(block), *(place for one in ranges for place in (one.offset, one.end)), length]
    if not all(before <= after for before, after in pairwise(ends)) or not all(r.length for r in ranges):
        return None
    return Seal(len(block), length, ranges, block[table + names_length :][:32], block[-32:])
