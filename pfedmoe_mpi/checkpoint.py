"""HDF5 checkpoints: one sealed file, written by all ranks, readable with any HDF5 tool.

Root lays the datasets out contiguously (early allocation, no fill values, aligned to 4 KiB) and sends their
byte offsets round; each rank writes its clients' bytes in place with pwrite. So one file is written in
parallel with an ordinary h5py. A seal in the HDF5 user block holds the file's length and the SHA-256 of every
byte range; it is checked with plain reads before the HDF5 library opens the file. Every writer fsyncs, then
root seals, renames and fsyncs the folder: a file with a checkpoint's name is complete or damaged, never
half-written.

The user block is header, one entry per client with bytes, SHA-256 of all the other bytes behind the user
block, zeros, and in its last 32 bytes the SHA-256 of all that. Its length follows from the number of entries,
so no byte of the file is left out.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi.comm import Comm
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.flat import Layout
from pfedmoe_mpi.sparse import SparseFile

FORMAT = 1
_MAGIC = b"pfedmoe\x00"
_HEADER = struct.Struct("<8sIIQ")  # magic, format, number of entries, length of the file
_RANGE = struct.Struct("<QQ32s")  # offset, length, SHA-256
_ALIGN = 4096
_PIECE = 1 << 24
_NAME = re.compile(r"round-(\d+)(-partial)?\.h5")


@dataclass(frozen=True)
class Content:
    """Everything in a checkpoint but the clients' bytes, equal on all ranks.

    `round` rounds are complete; `partial` is the int64 buffer of an unfinished next one, or None.
    """

    config: Mapping[str, Any]
    round: int
    state: np.ndarray
    state_layout: Layout
    client_layouts: Sequence[Layout]
    partition: Mapping[str, Sequence[np.ndarray]]
    history: Sequence[Mapping[str, Any]]
    identity: Mapping[str, str]  # digests and conditions of the run: data, partition, versions, threads
    partial: np.ndarray | None = None
    finished: Sequence[int] = ()  # the clients in the partial sum


def name(round: int, partial: bool) -> str:
    """`round-000020.h5`, or `round-000021-partial.h5` for a round in progress."""
    return f"round-{round + 1:06d}-partial.h5" if partial else f"round-{round:06d}.h5"


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder; a partial round 21 stands between 20 and 21."""

    named = ((_NAME.fullmatch(path.name), path) for path in folder.glob("round-*.h5"))
    aged = [((int(match[1]), not match[2]), path) for match, path in named if match]
    return [path for _, path in sorted(aged, reverse=True)]


# Writing


def write(
    comm: Comm, path: Path, content: Content, vectors: Mapping[int, np.ndarray], home: Sequence[int]
) -> None:
    """Write one checkpoint; collective. `vectors` are this rank's clients', `home` the rank of every client.

    Raises:
        CheckpointError: on all ranks, if any rank could not write; earlier checkpoints are untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    own = [client for client in range(len(home)) if home[client] == comm.rank]
    try:
        offsets = comm.from_root(_guarded(lambda: _lay_out(temporary, content), path), "checkpoint layout")
        hashes = comm.agree(
            _guarded(lambda: _write_clients(temporary, own, offsets, vectors), path), "checkpoint write"
        )
        digests = {client: digest for part in hashes if part for client, digest in part.items()}
        comm.from_root(
            _guarded(lambda: _finish(temporary, path, content, offsets, digests), path), "checkpoint seal"
        )
    except CheckpointError:
        if comm.rank == 0:
            with suppress(OSError):
                temporary.unlink()
        raise


def _guarded(work: Callable[[], Any], path: Path) -> Callable[[], Any]:
    """The system's errors as ours, so that all ranks learn of them."""

    def run() -> Any:
        try:
            return work()
        except OSError as error:
            remedy = "free space or mend the file system"
            raise CheckpointError(f"{path} cannot be written: {error}", remedy) from error

    return run


def _user_block(entries: int) -> int:
    """Length of the user block: a power of two with room for the seal."""
    needed = _HEADER.size + entries * _RANGE.size + 64
    return max(_ALIGN, 1 << (needed - 1).bit_length())


def _entries(content: Content) -> int:
    """How many clients have bytes."""
    return sum(layout.size > 0 for layout in content.client_layouts)


def _lay_out(path: Path, content: Content) -> list[int]:
    """Create the file with everything but the clients' bytes; the byte offset of each client's dataset."""
    # Objects are aligned from this size on, so that no two clients' bytes share a page.
    smallest = min([_ALIGN, *(4 * layout.size for layout in content.client_layouts if layout.size)])
    for stale in path.parent.glob(".round-*.h5.tmp"):
        stale.unlink()
    memory = SparseFile()
    with h5py.File(
        memory,
        "w",
        userblock_size=_user_block(_entries(content)),
        libver=("v110", "v110"),
        alignment_threshold=smallest,
        alignment_interval=_ALIGN,
    ) as file:
        file.attrs["format"] = FORMAT
        file.attrs["round"] = content.round
        file.attrs["partial"] = content.partial is not None
        for key, value in content.identity.items():
            file.attrs[key] = value
        file["config"] = json.dumps(content.config)
        file["history"] = "\n".join(json.dumps(row, allow_nan=False) for row in content.history)
        layouts = {layout.digest: layout for layout in [content.state_layout, *content.client_layouts]}
        for digest, layout in layouts.items():
            file[f"layouts/{digest}"] = layout.to_json()
        file["server/state"] = content.state
        file["server/state"].attrs["layout"] = content.state_layout.digest
        for split, rows in content.partition.items():
            file[f"partition/{split}"] = np.concatenate(rows) if rows else np.empty(0, np.int64)
            file[f"partition/{split}_offsets"] = np.cumsum([0, *map(len, rows)])
        if content.partial is not None:
            file["partial/sum"] = content.partial
            file["partial/finished"] = np.array(content.finished, np.int64)
        offsets = [_allocate(file, client, layout) for client, layout in enumerate(content.client_layouts)]
    memory.save(path)
    return offsets


def _allocate(file: h5py.File, client: int, layout: Layout) -> int:
    """An empty contiguous dataset for one client; its offset in the file."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    space = h5py.h5s.create_simple((layout.size,))
    key = f"clients/{client:06d}".encode()
    dataset = h5py.Dataset(h5py.h5d.create(file.id, key, h5py.h5t.IEEE_F32LE, space, properties, links))
    dataset.attrs["layout"] = layout.digest
    return int(dataset.id.get_offset() or 0) if layout.size else 0


def _write_clients(
    path: Path, own: Sequence[int], offsets: Sequence[int], vectors: Mapping[int, np.ndarray]
) -> dict[int, bytes]:
    """This rank's clients' bytes in their places, on the disk; SHA-256 of each."""
    digests = {}
    file = os.open(path, os.O_WRONLY)
    try:
        for client in own:
            data = np.ascontiguousarray(vectors[client], "<f4").view(np.uint8).data
            done = 0
            while done < len(data):
                done += os.pwrite(file, data[done : done + _PIECE], offsets[client] + done)
            digests[client] = sha256(data).digest()
        os.fsync(file)
    finally:
        os.close(file)
    return digests


def _finish(
    temporary: Path, path: Path, content: Content, offsets: Sequence[int], digests: Mapping[int, bytes]
) -> None:
    """Seal, fsync, rename, fsync the folder."""
    ranges = sorted(
        (offsets[client], 4 * layout.size, digests[client])
        for client, layout in enumerate(content.client_layouts)
        if layout.size
    )
    with open(temporary, "r+b") as file:
        length = file.seek(0, os.SEEK_END)
        start = _user_block(len(ranges))
        seal = _HEADER.pack(_MAGIC, FORMAT, len(ranges), length) + b"".join(_RANGE.pack(*r) for r in ranges)
        seal = (seal + _hash_rest(file, start, length, ranges)).ljust(start - 32, b"\0")
        file.seek(0)
        file.write(seal + sha256(seal).digest())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash_range(file: Any, offset: int, length: int, state: Any) -> None:
    file.seek(offset)
    while length > 0:
        piece = file.read(min(_PIECE, length))
        if not piece:
            raise EOFError
        state.update(piece)
        length -= len(piece)


def _hash_rest(file: Any, start: int, length: int, ranges: Sequence[tuple[int, int, bytes]]) -> bytes:
    """SHA-256 of what lies behind the user block and between the clients' ranges."""
    state = sha256()
    for offset, size, _ in [*ranges, (length, 0, b"")]:
        _hash_range(file, start, offset - start, state)
        start = offset + size
    return bytes(state.digest())


# Reading


def verify(path: Path, rank: int = 0, ranks: int = 1) -> None:
    """Check this rank's share of the seal with plain reads, before the HDF5 library sees the file.

    Raises:
        CheckpointError: missing, truncated, unfinished, of another format version, or changed since.
    """
    other = "use another checkpoint of the run: `restart RUN_DIR` takes the newest good one"
    try:
        with open(path, "rb") as file:
            length, start, ranges, rest = _read_seal(file, path, other)
            for offset, size, digest in ranges[rank::ranks]:
                state = sha256()
                _hash_range(file, offset, size, state)
                if state.digest() != digest:
                    raise CheckpointError(f"{path} is damaged: a client's bytes have changed", other)
            if rank == 0 and _hash_rest(file, start, length, ranges) != rest:
                raise CheckpointError(f"{path} is damaged: its bytes have changed", other)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}", "check the path") from error
    except (OSError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read: {error or 'it ends early'}", other) from error


def _read_seal(file: Any, path: Path, other: str) -> tuple[int, int, list[tuple[int, int, bytes]], bytes]:
    length = os.fstat(file.fileno()).st_size
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise CheckpointError(f"{path} is not a finished checkpoint of this program", other)
    _, version, count, expected = _HEADER.unpack(header)
    if version != FORMAT:
        problem = f"{path} has format version {version}, this program reads {FORMAT}"
        raise CheckpointError(problem, "use the version of this program that wrote it")
    if length != expected:
        what = "truncated" if length < expected else "too long"
        raise CheckpointError(f"{path} is {what}: {length} of {expected} bytes", other)
    start = _user_block(count)
    file.seek(0)
    block = file.read(start) if count * _ALIGN <= length else b""  # a damaged count asks for any length
    if len(block) < start or sha256(block[:-32]).digest() != block[-32:]:
        raise CheckpointError(f"{path} is damaged: its seal does not match", other)
    table = _HEADER.size + count * _RANGE.size
    return length, start, list(_RANGE.iter_unpack(block[_HEADER.size : table])), block[table : table + 32]


class Checkpoint:
    """A verified checkpoint, open for reading. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = h5py.File(path, "r", locking="best-effort")
        self.round = int(self._file.attrs["round"])
        self.config: dict[str, Any] = json.loads(self._text("config"))
        self.history: list[dict[str, Any]] = [json.loads(line) for line in self._text("history").splitlines()]
        self.identity = {key: value for key, value in self._file.attrs.items() if isinstance(value, str)}
        self.partial = self._file["partial/sum"][()] if "partial" in self._file else None
        self.finished = self._file["partial/finished"][()].tolist() if "partial" in self._file else []

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _text(self, key: str) -> str:
        return str(self._file[key].asstr()[()])

    @property
    def clients(self) -> int:
        return len(self._file["clients"]) if "clients" in self._file else 0

    @property
    def state(self) -> np.ndarray:
        """The server's vector, float32."""
        return np.asarray(self._file["server/state"][()])

    @property
    def state_layout(self) -> Layout:
        return self._layout("server/state")

    def vector(self, client: int) -> np.ndarray:
        """A client's private vector, float32."""
        return np.asarray(self._file[f"clients/{client:06d}"][()])

    def layout(self, client: int) -> Layout:
        """Where each private tensor lies in `vector`."""
        return self._layout(f"clients/{client:06d}")

    def _layout(self, key: str) -> Layout:
        return Layout.from_json(self._text(f"layouts/{self._file[key].attrs['layout']}"))

    def partition(self, split: str) -> list[np.ndarray]:
        """Row numbers of every client."""
        offsets = self._file[f"partition/{split}_offsets"][()]
        return np.split(self._file[f"partition/{split}"][()], offsets[1:-1])
