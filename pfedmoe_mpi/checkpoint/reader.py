"""Reading a checkpoint: first its seal, then its structure, then what it holds.

The seal tells damage; a stranger can seal anything. So nothing is used before every dataset was found where
the seal says it lies, of the type this program writes, and the texts and numbers agree with each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi.checkpoint import seal
from pfedmoe_mpi.core.flat import Entry, Layout
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.storage import untrusted_hdf5
from pfedmoe_mpi.storage.untrusted_hdf5 import UnfitError

_ATTRIBUTE = 1 << 20  # bytes; the longest of ours is a line
_ROOT = {"config", "history", "layouts", "server", "partition", "clients", "partial"}
_SPLITS = ("train", "validation", "test")
_FLOAT, _INT = h5py.h5t.IEEE_F32LE, h5py.h5t.STD_I64LE


def verify(path: Path, rank: int = 0, ranks: int = 1) -> None:
    """Check this rank's share of the seal with plain reads; on rank 0 then the structure too.

    Raises:
        CheckpointError: missing, truncated, unfinished, of another format version, changed since, or not what
            this program writes. It names the dataset.
    """
    seal.check(path, rank, ranks)
    if rank == 0:
        Checkpoint(path).close()


def open_everywhere(comm: Comm, path: Path) -> Checkpoint:
    """Open a verified checkpoint on every rank; collective.

    Raises:
        CheckpointError: on all ranks, if the file is missing on one of them.
    """
    return comm.attempt(lambda: Checkpoint(path), "opening the checkpoint")


class Checkpoint:
    """A verified checkpoint, open for reading. Use as a context manager.

    Raises:
        CheckpointError: its structure is not that of a checkpoint, whatever its seal says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with seal.plain(path) as file:
            self._ranges = {one.name: one for one in seal.read(file, path).ranges}
        self._layouts: dict[str, Layout] = {}
        self._file: Any = None
        try:
            self._file = h5py.File(path, "r", locking="best-effort")
            self._load()
        except BaseException as error:
            self.close()
            if isinstance(error, untrusted_hdf5.FROM_HDF5):
                problem = str(error).encode(errors="backslashreplace").decode()
                problem = f"{path} is no checkpoint of this program: {problem}"
                raise CheckpointError(problem, seal.REMEDY) from error
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _load(self) -> None:
        """Everything but vectors and row numbers; they are looked at where the looking needs no memory."""
        used = {"config", "history"}
        if set(self._file) - _ROOT:
            raise UnfitError(f"it holds {', '.join(map(ascii, set(self._file) - _ROOT))}")
        facts = {name: untrusted_hdf5.attribute(self._file, name, _ATTRIBUTE) for name in self._file.attrs}
        self.identity = {name: value for name, value in facts.items() if isinstance(value, str)}
        self.round = _natural(facts.get("round"), "round")
        self.config: dict[str, Any] = untrusted_hdf5.parsed(self._text("config"), "config")
        _check_config(self.config)
        _check_identity(self.identity)
        lines = self._text("history").split("\n")
        self.history: list[dict[str, Any]] = [
            untrusted_hdf5.parsed(line, "history") for line in lines if line
        ]
        _check_history(self.history, self.round)
        self.clients: int = self.config["clients"]
        if len(self._group("clients")) != self.clients:
            raise UnfitError(f"clients holds {len(self._group('clients'))}, config says {self.clients}")
        for key in ("server/state", *(f"clients/{client:06d}" for client in range(self.clients))):
            used |= {key, f"layouts/{self._check_vector(key)}"}
        for split in _SPLITS:
            used |= {f"partition/{split}", f"partition/{split}_offsets"}
            self._check_partition(split)
        self.partial: np.ndarray | None = None
        self.finished: list[int] = []
        if facts.get("partial") not in (True, False) or bool(facts["partial"]) != ("partial" in self._file):
            raise UnfitError("its attribute 'partial' and its datasets disagree")
        if facts["partial"]:
            used |= {"partial/sum", "partial/finished"}
            self._load_partial()
        if set(self._ranges) - used:
            raise UnfitError(f"its seal names {', '.join(map(ascii, set(self._ranges) - used))}")

    # Datasets

    def _group(self, name: str) -> Any:
        group = self._file.get(name) if self._file.id.links.exists(name.encode()) else None
        if not isinstance(group, h5py.Group):
            raise UnfitError(f"it has no group {name}")
        return group

    def _dataset(self, key: str, kind: Any = None, dimensions: int = 1) -> Any:
        """A dataset of exactly the bytes that the seal names so; without a `kind`, a text."""
        dataset = untrusted_hdf5.find(self._file, key)
        if dataset is None:
            raise UnfitError(f"it has no {key}")
        stored = dataset.id.get_type()
        if kind is None and (not isinstance(stored, h5py.h5t.TypeStringID) or stored.is_variable_str()):
            raise UnfitError(f"{key} is no text of fixed length")
        if len(dataset.shape) != dimensions or (kind is not None and stored != kind):
            raise UnfitError(f"{key} is {dataset.dtype} of shape {dataset.shape}")
        if dataset.id.get_create_plist().get_layout() != h5py.h5d.CONTIGUOUS:
            raise UnfitError(f"{key} is not stored in one piece")
        length = stored.get_size() * math.prod(dataset.shape)
        place = self._ranges.get(key)
        known = (place.offset, place.length) if place else None
        if known != ((dataset.id.get_offset(), length) if length else None):
            raise UnfitError(f"{key} lies elsewhere than the seal says")
        return dataset

    def _text(self, key: str) -> str:
        dataset = self._dataset(key, dimensions=0)
        kind = dataset.id.get_type()
        raw = np.empty((), f"S{kind.get_size()}")
        dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, raw, kind)
        return untrusted_hdf5.decoded(bytes(raw[()]), key)

    def _numbers(self, key: str) -> np.ndarray:
        """int64."""
        return np.asarray(self._dataset(key, _INT)[()], np.int64)

    def _check_vector(self, key: str) -> str:
        """The digest of its layout, which fits it."""
        vector = self._dataset(key, _FLOAT)
        digest = untrusted_hdf5.attribute(vector, "layout", _ATTRIBUTE)
        if not isinstance(digest, str) or not digest.isalnum():
            raise UnfitError(f"{key} names no layout")
        if digest not in self._layouts:
            self._layouts[digest] = _layout(self._text(f"layouts/{digest}"), digest)
        if self._layouts[digest].size != vector.shape[0]:
            raise UnfitError(f"{key} has {vector.shape[0]} numbers, its layout {self._layouts[digest].size}")
        return digest

    def _check_partition(self, split: str) -> None:
        rows, offsets = self._numbers(f"partition/{split}"), self._numbers(f"partition/{split}_offsets")
        ends = (offsets[0], offsets[-1]) if len(offsets) == self.clients + 1 else None
        if ends != (0, len(rows)) or (np.diff(offsets) < 0).any() or (rows < 0).any():
            raise UnfitError(f"partition/{split}_offsets does not divide partition/{split} among the clients")

    def _load_partial(self) -> None:
        self.partial, finished = self._numbers("partial/sum"), self._numbers("partial/finished")
        self.finished = finished.tolist()
        if len({*self.finished}) != len(finished) or not {*self.finished} <= {*range(self.clients)}:
            raise UnfitError("partial/finished holds more than clients")
        if len(self.partial) <= len(finished):
            raise UnfitError("partial/sum has no place for its members")

    # What it holds

    @property
    def state(self) -> np.ndarray:
        """The server's vector, float32."""
        return np.asarray(self._file["server/state"][()])

    @property
    def state_layout(self) -> Layout:
        return self._layout_of("server/state")

    def vector(self, client: int) -> np.ndarray:
        """A client's private vector, float32."""
        return np.asarray(self._file[f"clients/{client:06d}"][()])

    def layout(self, client: int) -> Layout:
        """Where each private tensor lies in `vector`."""
        return self._layout_of(f"clients/{client:06d}")

    def _layout_of(self, key: str) -> Layout:
        return self._layouts[untrusted_hdf5.attribute(self._file[key], "layout", _ATTRIBUTE)]

    def check_fits(self, state: Layout, clients: Sequence[Layout], sum_length: int) -> None:
        """Compare with the federation that shall take it up; `sum_length`: of an unfinished round's sum.

        Raises:
            CheckpointError: it is one of other models, whatever its configuration says.
        """
        own = [self.state_layout.digest, *(self.layout(client).digest for client in range(self.clients))]
        problem = ""
        if own != [layout.digest for layout in (state, *clients)]:
            problem = "its models are not those of its configuration"
        elif self.partial is not None and len(self.partial) != sum_length:
            problem = f"partial/sum has {len(self.partial)} numbers, its round sums {sum_length}"
        if problem:
            raise CheckpointError(f"{self.path} cannot be taken up: {problem}", seal.REMEDY)

    def partition(self, split: str) -> list[np.ndarray]:
        """Row numbers of every client."""
        offsets = self._numbers(f"partition/{split}_offsets")
        return np.split(self._numbers(f"partition/{split}"), offsets[1:-1])


# What the texts must say for the program to use them


def _natural(value: Any, what: str) -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or value < 0:
        raise UnfitError(f"{what} is no natural number")
    return int(value)


def _check_config(config: Any) -> None:
    """The few settings that a reader needs; the rest is checked where a configuration is built of it."""
    kinds: dict[str, type] = {"algorithm": str, "seed": int, "clients": int, "rounds": int}
    kinds |= {"model.pool": list, "data.source": str, "partition.kind": str}
    for path, kind in kinds.items():
        value: Any = config
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if type(value) is not kind or value in ([], ""):
            raise UnfitError(f"config has no usable {path}")
    if config["clients"] < 1 or not all(isinstance(name, str) for name in config["model"]["pool"]):
        raise UnfitError("config has no usable clients or model.pool")


def _check_identity(identity: Mapping[str, str]) -> None:
    for name in ("data_digest", "partition_digest"):
        if name not in identity:
            raise UnfitError(f"it has no attribute '{name}'")


def _check_history(history: list[Any], rounds: int) -> None:
    """One row per round; what is read of it has the shape in which it was written."""
    for number, row in enumerate(history, 1):
        if not isinstance(row, dict) or type(row.get("round")) is not int or row["round"] != number:
            raise UnfitError(f"history has no row of round {number}")
        for name in ("accuracy", "accuracy_cohort", "accuracy_validation"):
            summary = row[name] if isinstance(row.get(name), dict) else {}
            values = [summary.get(key, "") for key in ("mean", "weighted", "std", "worst")]
            if not all(value is None or type(value) in (int, float) for value in values):
                raise UnfitError(f"history has no {name} of round {number}")
    if len(history) != rounds:
        raise UnfitError(f"history has {len(history)} rows after {rounds} rounds")


def _layout(text: str, digest: str) -> Layout:
    """A layout whose tensors lie one after the other and whose name is its digest."""
    rows: Any = untrusted_hdf5.parsed(text, f"layouts/{digest}")
    row: Any
    entries: list[Entry] = []
    end = 0
    for row in rows if isinstance(rows, list) else (None,):
        fits = isinstance(row, list) and [type(item) for item in row] == [str, list, int, bool]
        if not fits or row[2] != end or not all(type(n) is int and n >= 0 for n in row[1]):
            raise UnfitError(f"layouts/{digest} is no layout")
        entries.append(Entry(row[0], tuple(row[1]), row[2], row[3]))
        end += entries[-1].size
    layout = Layout(tuple(entries))
    if len({entry.name for entry in entries}) != len(entries) or layout.digest != digest:
        raise UnfitError(f"layouts/{digest} is not the layout of this digest")
    return layout
