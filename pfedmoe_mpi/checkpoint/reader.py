"""Reading a checkpoint: first its seal, then its structure, then its content.

The seal detects damage, but anyone can seal any file. So nothing is used before three checks: every dataset
lies where the seal says, it has the type that this program writes, and texts and numbers agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi.checkpoint import confusion, measured, seal
from pfedmoe_mpi.checkpoint.client_vectors import ClientVectors
from pfedmoe_mpi.checkpoint.opened import Opened, open_files
from pfedmoe_mpi.checkpoint.sealed_file import ATTRIBUTE, FLOAT
from pfedmoe_mpi.config import recorded
from pfedmoe_mpi.config.sections import MOMENTS
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.storage import untrusted_hdf5, untrusted_json
from pfedmoe_mpi.storage.columns import Packed
from pfedmoe_mpi.storage.untrusted_json import UnusableError

_ROOT = {
    *("config", "code", "history", "measured", "confusion"),
    *("layouts", "server", "partition", "clients", "elsewhere", "partial"),
}
TRIES = 10  # openings of a checkpoint that a run replaces meanwhile
SPLITS = ("train", "validation", "test")


def verify(path: Path, rank: int = 0, ranks: int = 1) -> None:
    """Check this rank's share of the seal, and of what the file relies on; on rank 0 then the structure too.

    Raises:
        CheckpointError: the file is missing, truncated, unfinished, of another format version, damaged, or
            not of this program; the message names the dataset.
    """
    files = open_files(path)
    files.check(rank, ranks)
    if rank == 0:
        with Checkpoint(files) as loaded:
            loaded.check_measured()


def open_verified(path: Path) -> Checkpoint:
    """Open a checkpoint, and check all of it; the errors are those of `verify`."""
    files = open_files(path)
    files.check()
    loaded = Checkpoint(files)
    loaded.check_measured()
    return loaded


def open_everywhere(comm: Comm, path: Path) -> Checkpoint:
    """Open a checkpoint on every rank, and check all of it together; collective.

    Raises:
        CheckpointError: on all ranks, as for `verify`; or ranks have different files of this name.
    """
    return load_everywhere(comm, open_files_everywhere(comm, path))


def open_files_everywhere(comm: Comm, path: Path) -> Opened:
    """Open the same files of a checkpoint on every rank, so that a run may remove them; collective.

    Raises:
        CheckpointError: on all ranks: a file is missing, or ranks have different files of this name.
    """
    for _ in range(TRIES):
        files = comm.attempt(lambda: open_files(path), "opening the checkpoint")
        if len(set(comm.gather(files.seal.digest, "comparing checkpoints"))) == 1:
            return files
    problem = f"{path} is not the same file on all ranks"
    raise CheckpointError(problem, "name a file in a folder that all hosts share")


def load_everywhere(comm: Comm, files: Opened) -> Checkpoint:
    """Check the open files of a checkpoint, a share on each rank, and return it; collective.

    Raises:
        CheckpointError: on all ranks, as for `verify`.
    """
    comm.agree(lambda: files.check(comm.rank, comm.size), "checking the checkpoint")
    loaded = comm.attempt(lambda: Checkpoint(files), "reading the checkpoint")
    comm.from_root(loaded.check_measured, "checking clients' numbers")
    return loaded


class Checkpoint(ClientVectors):
    """A verified checkpoint, open for reading. Use as a context manager.

    The vectors can be read afterwards, too.

    Raises:
        CheckpointError: its structure is not that of a checkpoint, even if its seal is valid.
    """

    def __init__(self, source: Path | Opened) -> None:
        super().__init__(source)
        path = self.path
        try:
            self._file = h5py.File(self.files.file, "r")
            self._load()
        except BaseException as error:
            self.close()
            if isinstance(error, untrusted_hdf5.FROM_HDF5):
                problem = str(error).encode(errors="backslashreplace").decode()
                problem = f"{path} is not a checkpoint of this program: {problem}"
                remedy = untrusted_hdf5.opening_remedy(error, path, seal.REMEDY)
                raise CheckpointError(problem, remedy) from error
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _load(self) -> None:
        """Check the whole structure; read all of it except the vectors and row numbers."""
        used = {"config", "history"}
        if set(self._file) - _ROOT:
            raise UnusableError(f"it holds unknown objects: {', '.join(map(ascii, set(self._file) - _ROOT))}")
        facts = {
            name: untrusted_hdf5.read_attribute(self._file, name, ATTRIBUTE) for name in self._file.attrs
        }
        self.identity = {name: value for name, value in facts.items() if isinstance(value, str)}
        self.round = _natural(facts.get("round"), "round")
        self.config: dict[str, Any] = untrusted_json.parse(self._text("config"), "config")
        _check_config(self.config)
        self.config = recorded.complete(self.config)
        _check_identity(self.identity)
        self.code: dict[str, str] = {}  # the user's own files, by name
        if "code" in self._ranges:
            used.add("code")
            self.code = check_code(untrusted_json.parse(self._text("code"), "code"))
        lines = self._text("history").split("\n")
        self.history: list[dict[str, Any]] = [untrusted_json.parse(line, "history") for line in lines if line]
        _check_history(self.history, self.round)
        self.clients: int = self.config["clients"]
        self._measured: Packed | None = None
        if "measured" in self._file:
            used |= {f"measured/{name}" for name in measured.NAMES}
            self._measured = measured.read(self._dataset, self.clients, self.round)
            self.history = measured.joined(self.history, self._measured, self.clients)
        used |= {"server/state", f"layouts/{self._check_vector('server/state')}"}
        used |= self._load_clients()
        if "server/first_state" in self._ranges:
            used.add("server/first_state")
            self._check_length("server/first_state", 1)
        for split in SPLITS:
            used |= {f"partition/{split}", f"partition/{split}_offsets"}
            self._check_partition(split)
        if _moments(self.config):
            used.add("server/moments")
            self._check_length("server/moments", _moments(self.config))
        self.confusion: confusion.Confusion | None = None
        if confusion.GROUP in self._file:
            used |= {*confusion.NAMES}
            self.confusion = confusion.read(self._numbers, self.clients, self.round)
        self.partial: np.ndarray | None = None
        self.finished: list[int] = []
        if facts.get("partial") not in (True, False) or bool(facts["partial"]) != ("partial" in self._file):
            raise UnusableError("its attribute 'partial' contradicts its datasets")
        if facts["partial"]:
            used |= {"partial/sum", "partial/finished"}
            self._load_partial()
        if set(self._ranges) - used:
            raise UnusableError(
                f"its seal names unknown datasets: {', '.join(map(ascii, set(self._ranges) - used))}"
            )

    def _check_length(self, key: str, vectors: int) -> None:
        """Check that a dataset has the length of this many of the server's vectors."""
        found = self._dataset(key, FLOAT).shape[0]
        if found != vectors * self.state_layout.size:
            each = "the numbers" if vectors == 1 else f"{vectors} for each"
            raise UnusableError(f"{key} has {found} numbers, not {each} of the server's vector")

    def _check_partition(self, split: str) -> None:
        """Check that the offsets of a split divide its row numbers among the clients."""
        rows, offsets = self._numbers(f"partition/{split}"), self._numbers(f"partition/{split}_offsets")
        ends = (offsets[0], offsets[-1]) if len(offsets) == self.clients + 1 else None
        if ends != (0, len(rows)) or (np.diff(offsets) < 0).any() or (rows < 0).any():
            raise UnusableError(
                f"partition/{split}_offsets does not divide partition/{split} among the clients"
            )

    def check_measured(self) -> None:
        """Read all numbers of clients; raise CheckpointError if some are impossible."""
        try:
            if self._measured:
                self._measured.check_values(self.clients)
        except UnusableError as error:
            problem = f"{self.path} is not a checkpoint of this program: {error}"
            raise CheckpointError(problem, seal.REMEDY) from error

    def _load_partial(self) -> None:
        """Read the sum of a round in progress and the clients finished in it."""
        self.partial, finished = self._numbers("partial/sum"), self._numbers("partial/finished")
        self.finished = finished.tolist()
        if len({*self.finished}) != len(finished) or not {*self.finished} <= {*range(self.clients)}:
            raise UnusableError("partial/finished is not a set of clients")
        if len(self.partial) <= len(finished):
            raise UnusableError("partial/sum is too short for the flags of its members")

    # Content

    @property
    def state(self) -> np.ndarray:
        """The server's vector, float32."""
        return np.asarray(self._file["server/state"][()])

    @property
    def moments(self) -> np.ndarray:
        """The vectors that the server's optimiser keeps, one after the other, float32."""
        return np.asarray(self._file["server/moments"][()] if _moments(self.config) else [], np.float32)

    @property
    def state_layout(self) -> Layout:
        """The layout of the server's tensors in `state`."""
        return self._layout_of("server/state")

    @property
    def first_state(self) -> np.ndarray:
        """The server's vector before round 1, float32; empty unless clients begin with values of it."""
        known = "server/first_state" in self._ranges
        return np.asarray(self._file["server/first_state"][()] if known else [], np.float32)

    def check_fits(self, state: Layout, clients: Sequence[Layout], sum_length: int) -> None:
        """Check that a federation can resume from this checkpoint.

        Args:
            state: the layout of the federation's server.
            clients: the layouts of its clients.
            sum_length: numbers in its round sum.

        Raises:
            CheckpointError: the checkpoint holds other models than its configuration gives.
        """
        layouts = [self.state_layout.digest, *(self.layout(client).digest for client in range(self.clients))]
        problem = ""
        if layouts != [layout.digest for layout in (state, *clients)]:
            problem = "its models are not those of its configuration"
        elif self.partial is not None and len(self.partial) != sum_length:
            problem = f"partial/sum has {len(self.partial)} numbers, but its round sums {sum_length}"
        if problem:
            raise CheckpointError(f"{self.path} cannot be resumed: {problem}", seal.REMEDY)

    def partition(self, split: str) -> list[np.ndarray]:
        """Return the row numbers of every client in a split."""
        offsets = self._numbers(f"partition/{split}_offsets")
        return np.split(self._numbers(f"partition/{split}"), offsets[1:-1])


# Checks of the texts that the program uses


def _natural(value: Any, what: str) -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or value < 0:
        raise UnusableError(f"{what} is not a natural number")
    return int(value)


def _check_config(config: Any) -> None:
    """Check the few settings that readers use; building a configuration checks the others."""
    kinds: dict[str, type] = {"algorithm": str, "seed": int, "clients": int, "rounds": int}
    kinds |= {"model.pool": list, "data.source": str, "partition.kind": str}
    for path, kind in kinds.items():
        value: Any = config
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if type(value) is not kind or value in ([], ""):
            raise UnusableError(f"config has no usable {path}")
    if config["clients"] < 1 or not all(isinstance(name, str) for name in config["model"]["pool"]):
        raise UnusableError("config has no usable clients or model.pool")


def check_code(code: Any) -> dict[str, str]:
    """Return the user's own files by name; raise UnusableError if that is not what `code` is.

    A name is a path of a Python file below the run folder's `code`.
    """
    if not isinstance(code, dict) or not all(isinstance(text, str) for text in code.values()):
        raise UnusableError("code is not a text for each file")
    for name in code:
        path = PurePosixPath(name)
        outside = path.is_absolute() or ".." in path.parts or str(path) != name
        if outside or path.suffix != ".py" or not name.isprintable():
            raise UnusableError(f"code has a file of the name {name[:80]!a}")
    return code


def _moments(config: Mapping[str, Any]) -> int:
    """Return how many vectors the server's optimiser keeps; files of earlier versions have none."""
    server = config.get("server", {})
    name = server.get("optimiser", "none") if isinstance(server, Mapping) else None
    if not isinstance(name, str) or name not in MOMENTS:
        raise UnusableError("config has no usable server.optimiser")
    return MOMENTS[name]


def _check_identity(identity: Mapping[str, str]) -> None:
    for name in ("data_digest", "partition_digest"):
        if name not in identity:
            raise UnusableError(f"it has no attribute '{name}'")


def _check_history(history: list[Any], rounds: int) -> None:
    """Check that there is one row per round, and the types of what readers use of it."""
    for number, row in enumerate(history, 1):
        if not isinstance(row, dict) or type(row.get("round")) is not int or row["round"] != number:
            raise UnusableError(f"history has no row of round {number}")
        for name in ("accuracy", "accuracy_cohort", "accuracy_validation"):
            summary = row[name] if isinstance(row.get(name), dict) else {}
            values = [summary.get(key, "") for key in ("mean", "weighted", "std", "worst")]
            if not all(value is None or type(value) in (int, float) for value in values):
                raise UnusableError(f"history has no {name} of round {number}")
    if len(history) != rounds:
        raise UnusableError(f"history has {len(history)} rows, but round = {rounds}")
