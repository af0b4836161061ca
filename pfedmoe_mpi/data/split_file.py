"""A split that a file lists: row numbers by client, as `data partition` or other programs write them.

HDF5 is what `partition_file.write_rows` writes. JSON is a list of clients, an object of clients by name, or
FL-bench's partition, whose list is called `data_indices`. A client is a list of row numbers, or an object
with the lists `train`, `validation` (or `val`, `valid`) and `test`. Pickles are never read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi.data.owners import NO_CLIENT
from pfedmoe_mpi.data.sources.hdf5_table import check_chunks, find_table
from pfedmoe_mpi.data.sources.numbering import renumber
from pfedmoe_mpi.errors import DataError, PartitionError
from pfedmoe_mpi.names import check_text
from pfedmoe_mpi.storage import untrusted_hdf5, untrusted_json
from pfedmoe_mpi.storage.untrusted_json import UnusableError

PARTS = ("train", "validation", "test")
_SYNONYMS = {"val": "validation", "valid": "validation"}
_LONGEST = 1 << 20  # bytes of an attribute
_DOCUMENTED = "write it as pfedmoe_mpi/data/README.md describes under «A split from a file»"
_LAYOUT = "write it with `data partition OUT.h5`"

Rows = tuple[np.ndarray, ...]  # row numbers of every client, int64


@dataclass(frozen=True, eq=False)
class Split:
    """The rows of every client, as a file lists them; not compared with the data yet.

    `test` and `validation` are empty if the file does not list these parts; `train` are then the rows of all
    parts that it leaves out. `unseen` and `reserved` are as in `Partition`; `names` are the clients' names if
    they have any; `labels` is the digest of the labels that the rows belong to, empty if unknown.
    """

    path: Path
    train: Rows
    validation: Rows = ()
    test: Rows = ()
    unseen: frozenset[int] = frozenset()
    reserved: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    names: tuple[str, ...] = ()
    labels: str = ""

    @property
    def clients(self) -> int:
        """The number of clients N."""
        return len(self.train)

    @property
    def parts(self) -> list[Rows]:
        """The parts that the file lists."""
        return [part for part in (self.train, self.validation, self.test) if part]

    def owner(self, part: Rows, rows: int) -> np.ndarray:
        """Return the owner (rows,) of every row in `part`, `NO_CLIENT` for the others."""
        owner = np.full(rows, NO_CLIENT, np.int64)
        for client, numbers in enumerate(part):
            owner[numbers] = client
        return owner

    def check(self, labels: np.ndarray) -> None:
        """Check the split against the data's `labels` (n,).

        Raises:
            PartitionError: a row number that the data do not have, a row in two places, a client without
                rows, or labels other than those that the file was written for.
        """
        remedy = f"name the data that {self.path} was written for: --data.source and --data.path"
        if self.labels and self.labels != labels_digest(labels):
            problem = f"partition.file = {self.path} was written for data with other labels"
            raise PartitionError(problem, remedy)
        met = np.full(len(labels), NO_CLIENT - 1, np.int64)
        for who, client, numbers in self._groups():
            outside = numbers[(numbers < 0) | (numbers >= len(labels))]
            if len(outside):
                raise PartitionError(
                    f"partition.file = {self.path}: {who} has row {outside[0]}, but the data have rows 0 to "
                    f"{len(labels) - 1}",
                    remedy,
                )
            values, counts = np.unique(numbers, return_counts=True)
            twice = values[(counts > 1) | (met[values] >= NO_CLIENT)]
            if len(twice):
                first = met[twice[0]]
                other = f"client {first}" if first >= 0 else "the server" if first == NO_CLIENT else who
                problem = f"partition.file = {self.path}: row {twice[0]} is listed for {other} and for {who}"
                raise PartitionError(problem, "list every row once: no client may be tested on training rows")
            met[numbers] = client
        self._check_empty()

    def _groups(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """Yield who has rows, the number for it, and the rows: the server's, then every client's."""
        yield "the server", NO_CLIENT, self.reserved
        for client in range(self.clients):
            yield f"client {client}", client, np.concatenate([part[client] for part in self.parts])

    def _check_empty(self) -> None:
        for name, part in (("training", self.train), ("test", self.test)):
            empty = [client for client, rows in enumerate(part) if not len(rows)]
            if empty:
                raise PartitionError(
                    f"partition.file = {self.path}: client {empty[0]} has no {name} rows",
                    "give every client training rows, and test rows to all or to none: "
                    "partition.test_fraction then divides each client's rows",
                )


def labels_digest(labels: np.ndarray) -> str:
    """Return the SHA-256 of the labels (n,) of all rows, in hexadecimal."""
    return sha256(np.asarray(labels).astype("<i8").tobytes()).hexdigest()


def read_split(path: Path) -> Split:
    """Read a split from HDF5, or from JSON for any other name.

    Raises:
        DataError: the file cannot be read, or is not a split.
    """
    try:
        if path.suffix.lower() in {".pkl", ".pickle"}:
            raise DataError(
                f"partition.file = {path} is a pickle, which is never read, because it can run code",
                "convert it to JSON as pfedmoe_mpi/data/README.md shows under «A split from a file»",
            )
        if path.suffix.lower() in {".h5", ".hdf5"}:
            return _read_hdf5(path)
        return _from_json(path, untrusted_json.parse(path.read_text(encoding="utf-8-sig"), "it"))
    except UnusableError as error:
        raise DataError(f"partition.file = {path}: {error}", _DOCUMENTED) from error
    except FileNotFoundError as error:
        raise DataError(f"partition.file = {path}: there is no such file", "check the path") from error
    except untrusted_hdf5.FROM_HDF5 as error:
        remedy = untrusted_hdf5.opening_remedy(error, path, _DOCUMENTED)
        raise DataError(f"partition.file = {path} cannot be read: {error}", remedy) from error


# JSON


def _from_json(path: Path, tree: Any) -> Split:
    if isinstance(tree, dict) and "data_indices" in tree:
        tree = tree["data_indices"]
    names: tuple[str, ...] = ()
    if isinstance(tree, dict):
        places, names = renumber(tree)
        if len(names) < len(tree):
            raise UnusableError("two clients have the same name")
        by_place = {place: name for name, place in places.items()}
        tree = [tree[by_place[place]] for place in range(len(names))]
        for name in names:
            check_text(f"partition.file = {path}: the client's name", name, DataError)
    if not isinstance(tree, list) or not tree:
        raise UnusableError("it is neither a list of clients nor an object of clients by name")
    clients = [_client(number, value) for number, value in enumerate(tree)]
    if names == tuple(map(str, range(len(names)))):
        names = ()
    return _split(path, {part: [client[part] for client in clients] for part in PARTS}, names=names)


def _client(number: int, value: Any) -> dict[str, np.ndarray]:
    """Return a client's rows by part."""
    parts = {"train": value} if isinstance(value, list) else value
    if not isinstance(parts, dict):
        raise UnusableError(f"client {number} is neither a list of row numbers nor an object of such lists")
    rows = {part: np.empty(0, np.int64) for part in PARTS}
    for name, numbers in parts.items():
        part = _SYNONYMS.get(name, name)
        if part not in rows or len(rows[part]):
            problem = f"client {number} has the part {name!a}; known are train, validation (val) and test"
            raise UnusableError(problem)
        whole = isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)
        if not whole:
            raise UnusableError(f"{name} of client {number} is not a list of row numbers, counted from 0")
        rows[part] = np.array(numbers, np.int64)
    return rows


def _split(path: Path, parts: Mapping[str, Sequence[np.ndarray]], **facts: Any) -> Split:
    """Return a split; a part without any row counts as not listed."""
    validation, test = (
        tuple(parts[name]) if any(map(len, parts[name])) else () for name in ("validation", "test")
    )
    return Split(path, tuple(parts["train"]), validation, test, **facts)


# HDF5


def _read_hdf5(path: Path) -> Split:
    with h5py.File(path, "r", locking="best-effort") as file:
        untrusted_hdf5.check_heaps(file, path)
        parts = {part: _by_client(file, part, path) for part in PARTS}
        if len({len(clients) for clients in parts.values()}) > 1:
            raise UnusableError("its parts have different numbers of clients")
        clients = len(parts["train"])
        unseen = _numbers(file, "unseen", path)
        if len(unseen) and not 0 <= unseen.min() <= unseen.max() < clients:
            raise UnusableError(f"unseen is not a list of clients from 0 to {clients - 1}")
        digest = untrusted_hdf5.read_attribute(file, "labels", _LONGEST)
        names = untrusted_json.parse(
            str(untrusted_hdf5.read_attribute(file, "client_names", _LONGEST) or "[]"), "client_names"
        )
        if not isinstance(names, list) or len(names) not in {0, clients}:
            raise UnusableError("client_names is not a list with a name for every client")
        return _split(
            path,
            parts,
            unseen=frozenset(unseen.tolist()),
            reserved=_numbers(file, "reserved", path),
            names=tuple(map(str, names)),
            labels=str(digest or ""),
        )


def _by_client(file: Any, part: str, path: Path) -> list[np.ndarray]:
    rows, offsets = _numbers(file, f"{part}/rows", path), _numbers(file, f"{part}/offsets", path)
    ends = (offsets[0], offsets[-1]) if len(offsets) > 1 else None
    if ends != (0, len(rows)) or (np.diff(offsets) < 0).any():
        raise UnusableError(f"{part}/offsets does not divide {part}/rows among the clients")
    return np.split(rows, offsets[1:-1])


def _numbers(file: Any, name: str, path: Path) -> np.ndarray:
    table = find_table(file, name, path, _LAYOUT)
    if len(table.shape) != 1 or table.dtype.kind not in "iu":
        raise UnusableError(f"{name} is {table.dtype} of shape {table.shape}, not a list of integers")
    check_chunks(table, f"{name} of {path}")
    return np.asarray(table[()], np.int64)
