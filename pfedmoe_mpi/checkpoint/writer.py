"""Writing a checkpoint: one sealed HDF5 file, by all ranks in parallel.

Rank 0 lays the datasets out contiguously (early allocation, no fill values, clients' aligned to 4 KiB) and
sends their byte offsets to all; each rank writes its clients' bytes in place with pwrite. So an ordinary h5py
is enough to write one file in parallel. A seal in the HDF5 user block (`seal.py`) holds the file's length and
the name and SHA-256 of every dataset. Every rank fsyncs, then rank 0 seals the file, renames it and fsyncs
the folder: a file with a checkpoint's name is complete or damaged, never half-written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi.checkpoint import measured, seal
from pfedmoe_mpi.checkpoint.confusion import Confusion
from pfedmoe_mpi.checkpoint.memory_file import SparseFile
from pfedmoe_mpi.checkpoint.places import FILES, ROWS, Places
from pfedmoe_mpi.checkpoint.seal import FORMAT, Table
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.core.rows import Rows
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.storage import durable
from pfedmoe_mpi.storage.columns import without_columns
from pfedmoe_mpi.storage.lock import ReplacedError

REPLACED = "move the folder back to this path"
_PIECE = 1 << 24
_CLIENTS = "clients/"


@dataclass(frozen=True)
class Content:
    """Everything in a checkpoint except the clients' vectors, equal on all ranks.

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
    code: Mapping[str, str] = field(default_factory=dict)  # the user's own files, by name
    moments: np.ndarray = field(default_factory=lambda: np.empty(0))  # kept by the server's optimiser
    confusion: Confusion | None = None  # of the last evaluation
    first_state: np.ndarray = field(default_factory=lambda: np.empty(0))  # if clients begin with values of it
    held: Sequence[int] | None = None  # the clients whose vectors are in the file, ascending; None: all
    elsewhere: Places = field(default_factory=Places)  # of the other clients that have trained

    @property
    def held_clients(self) -> Sequence[int]:
        """The clients whose vectors are in the file."""
        return range(len(self.client_layouts)) if self.held is None else self.held

    @property
    def length_of_others(self) -> int:
        """Bytes of the numbers that are not clients' vectors."""
        return sum(array.nbytes for array in _arrays(self).values())

    @property
    def layouts(self) -> dict[str, Layout]:
        """The layouts of the server and of the clients, each once, by their digests in order."""
        unique = {id(layout): layout for layout in (self.state_layout, *self.client_layouts)}
        by_digest = {layout.digest: layout for layout in unique.values()}
        return dict(sorted(by_digest.items()))


def write(
    comm: Comm,
    path: Path,
    content: Content,
    vectors: Callable[[int], np.ndarray],
    home: Sequence[int],
    check: Callable[[], None] = lambda: None,
    divide: Callable[[Content], Content] = lambda content: content,
) -> Places:
    """Write one checkpoint; collective. Return the places of the vectors in it.

    Args:
        content: what rank 0 writes.
        vectors: returns the vector of one of this rank's clients, float32.
        home: the rank of every client.
        check: called on rank 0 before it creates the file and before it publishes it; an OSError leaves the
            folder as it is.
        divide: called on rank 0; returns the content with the clients that the file holds, and the others'
            places.

    Raises:
        CheckpointError: on all ranks, if any rank could not write; earlier checkpoints are untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")

    def lay_out() -> Table:
        check()
        return _lay_out(temporary, divide(content))

    def finish() -> None:
        check()
        _finish(temporary, path, table, digests)

    try:
        table: Table = comm.from_root(_guarded(lay_out, path), "checkpoint layout")
        held = {int(name.removeprefix(_CLIENTS)): name for name in table if name.startswith(_CLIENTS)}
        own = [client for client in held if home[client] == comm.rank]
        hashes = comm.agree(
            _guarded(lambda: _write_clients(temporary, own, table, vectors), path), "checkpoint write"
        )
        digests = {key: digest for part in hashes if part for key, digest in part.items()}
        comm.from_root(_guarded(finish, path), "checkpoint seal")
    except CheckpointError:
        if comm.rank == 0:
            with suppress(OSError):
                temporary.unlink()
        raise
    return Places.of(path.name, {client: (*table[key], digests[key]) for client, key in held.items()})


def write_alone(temporary: Path, content: Content, vectors: Callable[[int], np.ndarray]) -> None:
    """Write and seal one checkpoint, on this rank alone; the caller publishes it.

    Raises:
        OSError: the file cannot be written.
    """
    table = _lay_out(temporary, content)
    digests = _write_clients(temporary, content.held_clients, table, vectors)
    with open(temporary, "r+b") as file:
        seal.put(file, table, digests)


def _guarded(work: Callable[[], Any], path: Path) -> Callable[[], Any]:
    """Return `work` with the system's errors as CheckpointError, which `Comm` raises on all ranks."""

    def run() -> Any:
        try:
            return work()
        except OSError as error:
            remedy = REPLACED if isinstance(error, ReplacedError) else "free space, or fix the file system"
            raise CheckpointError(f"{path} cannot be written: {error}", remedy) from error

    return run


def _client(client: int) -> str:
    """Return the path of a client's dataset."""
    return f"{_CLIENTS}{client:06d}"


def _texts(content: Content) -> dict[str, bytes]:
    """Return the text datasets: configuration, one line per round, every layout once, the user's own code."""
    texts = {
        "config": json.dumps(content.config),
        "history": "\n".join(json.dumps(without_columns(row), allow_nan=False) for row in content.history),
    }
    if content.code:
        texts["code"] = json.dumps(content.code)
    for digest, layout in content.layouts.items():
        texts[f"layouts/{digest}"] = layout.to_json()
    if content.elsewhere.files:
        texts[FILES] = "\n".join(content.elsewhere.files)
    return {key: text.encode() for key, text in texts.items()}


def _arrays(content: Content) -> dict[str, np.ndarray]:
    """Return the datasets of numbers that rank 0 writes: vectors, places, rows, columns, a round's sum."""
    arrays: dict[str, np.ndarray] = {"server/state": np.asarray(content.state, "<f4")}
    arrays |= measured.datasets(content.history)
    if len(content.moments):
        arrays["server/moments"] = np.asarray(content.moments, "<f4")
    if len(content.first_state):
        arrays["server/first_state"] = np.asarray(content.first_state, "<f4")
    if content.elsewhere.files:
        arrays[ROWS] = content.elsewhere.rows
    number = {digest: place for place, digest in enumerate(content.layouts)}
    of_kind = {id(layout): number[layout.digest] for layout in content.client_layouts}
    arrays["layouts/of_clients"] = np.array([of_kind[id(one)] for one in content.client_layouts], "<i8")
    if content.confusion:
        arrays |= content.confusion.datasets()
    for split, rows in content.partition.items():
        joined = Rows.of(rows)
        arrays[f"partition/{split}"] = joined.flat.astype("<i8")
        arrays[f"partition/{split}_offsets"] = joined.offsets.astype("<i8")
    if content.partial is not None:
        arrays["partial/sum"] = content.partial.astype("<i8", copy=False)
        arrays["partial/finished"] = np.array(content.finished, "<i8")
    return arrays


def _lay_out(path: Path, content: Content) -> Table:
    """Create the file with everything except the clients' bytes; return every dataset's place."""
    # Objects of at least this size are aligned, so that no page holds bytes of two clients.
    sizes = {client: content.client_layouts[client].size for client in content.held_clients}
    smallest = min([seal.ALIGN, *(4 * size for size in sizes.values() if size)])
    for stale in path.parent.glob(".round-*.h5.tmp"):
        stale.unlink()
    texts, arrays = _texts(content), _arrays(content)
    names = [*(key for key, raw in {**texts, **arrays}.items() if len(raw))]
    names += [_client(client) for client, size in sizes.items() if size]
    names += [] if content.history else ["history"]  # an empty text takes one byte in HDF5
    memory = SparseFile()
    with h5py.File(
        memory,
        "w",
        userblock_size=seal.block_length(names),
        libver=("v110", "v110"),
        alignment_threshold=smallest,
        alignment_interval=seal.ALIGN,
    ) as file:
        file.attrs["format"] = FORMAT
        file.attrs["round"] = content.round
        file.attrs["partial"] = content.partial is not None
        for key, value in content.identity.items():
            _describe(file, key, value)
        datasets = [_put(file, key, np.array(raw or b"\0")) for key, raw in texts.items()]
        datasets += [_put(file, key, array) for key, array in arrays.items()]
        _describe(file["server/state"], "layout", content.state_layout.digest)
        file.create_group("clients")
        for client, size in sizes.items():
            datasets.append(_allocate(file, _client(client), h5py.h5t.IEEE_F32LE, (size,)))
            _describe(datasets[-1], "layout", content.client_layouts[client].digest)
        table = {d.name[1:]: (int(d.id.get_offset()), int(d.nbytes)) for d in datasets if d.nbytes}
    assert set(table) == set(names), "the user block was made for other datasets"
    memory.save(path)
    return table


def _describe(owner: Any, key: str, value: str) -> None:
    """Add a text of fixed length as an attribute: it lies in the object's header and needs no other place."""
    raw = value.encode()
    owner.attrs.create(key, np.array(raw), dtype=h5py.string_dtype("utf-8", max(1, len(raw))))


def _allocate(file: Any, key: str, kind: Any, shape: tuple[int, ...]) -> Any:
    """Create an empty contiguous dataset whose place in the file is known at once."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    return h5py.Dataset(h5py.h5d.create(file.id, key.encode(), kind, space, properties, links))


def _put(file: Any, key: str, data: np.ndarray) -> Any:
    """Create a dataset with its content: a text (a scalar of UTF-8 bytes) or numbers."""
    kind = h5py.h5t.py_create(data.dtype, logical=True)
    if data.dtype.kind == "S":
        kind.set_cset(h5py.h5t.CSET_UTF8)
    dataset = _allocate(file, key, kind, data.shape)
    dataset.id.write(h5py.h5s.ALL, h5py.h5s.ALL, data, kind)
    return dataset


def _write_clients(
    path: Path, own: Sequence[int], table: Table, vectors: Callable[[int], np.ndarray]
) -> dict[str, bytes]:
    """Write this rank's clients' bytes in their places and fsync them; return the SHA-256 of each."""
    digests = {}
    file = os.open(path, os.O_WRONLY)
    try:
        for client in (client for client in own if _client(client) in table):
            data = np.ascontiguousarray(vectors(client), "<f4").view(np.uint8).data
            offset, length = table[_client(client)]
            assert len(data) == length, f"client {client} has {len(data)} bytes, its layout {length}"
            done = 0
            while done < length:
                done += os.pwrite(file, data[done : done + _PIECE], offset + done)
            digests[_client(client)] = sha256(data).digest()
        os.fsync(file)
    finally:
        os.close(file)
    return digests


def _finish(temporary: Path, path: Path, table: Table, digests: Mapping[str, bytes]) -> None:
    """Seal the file and publish it under its name."""
    with open(temporary, "r+b") as file:
        seal.put(file, table, digests)
    durable.publish(temporary, path)
