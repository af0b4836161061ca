"""A client's model in a file of its own, for that client: it holds nothing of the other clients.

Tensors are datasets `/PART/TENSOR` with their torch names, for the server's parts and the client's.
Attributes hold the client, the round, the configuration, and the description of the training samples;
`/code.json` holds the user's own code, if the run had any.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi.checkpoint import frozen, tensors
from pfedmoe_mpi.checkpoint.reader import Checkpoint, check_code
from pfedmoe_mpi.config import recorded
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.models.names import labels
from pfedmoe_mpi.storage import durable, untrusted_hdf5, untrusted_json
from pfedmoe_mpi.storage.untrusted_json import UnusableError
from pfedmoe_mpi.user_code import label

_ATTRIBUTE = 1 << 16  # bytes; the longest attribute that HDF5 keeps in an object's header
_CODE = "code.json"  # a name that no part can have
_MOST_CODE = 1 << 24  # bytes
_REMEDY = "`export CHECKPOINT.h5 --client K OUT.h5` writes one from a checkpoint"


def write(loaded: Checkpoint, client: int, vectors: Callable[[int], np.ndarray], out: Path) -> None:
    """Write the server's and one client's tensors to an HDF5 file, the frozen ones included.

    Args:
        vectors: returns a client's private vector.

    Raises:
        CheckpointError: the client does not exist, the frozen tensors are missing, or the output exists or
            cannot be written.
    """
    if os.path.lexists(out):
        raise CheckpointError(f"the output {out} exists already", "choose another name")
    if not os.path.isdir(out.parent):
        raise CheckpointError(f"there is no folder {out.parent}", "create it, or choose another name")
    if client >= loaded.clients:
        raise CheckpointError(f"there is no client {client}", f"clients are 0 to {loaded.clients - 1}")
    try:
        with durable.new_file(out) as temporary, h5py.File(temporary, "w") as file:
            _fill(file, loaded, client, vectors(client))
    except (OSError, RuntimeError, ValueError, KeyError) as error:  # tensors may have impossible names
        problem = f"{out} cannot be written: {error}"
        raise CheckpointError(problem, "check the folder and its space") from error


def _fill(file: Any, loaded: Checkpoint, client: int, vector: np.ndarray) -> None:
    """Write the attributes and tensors."""
    pool = labels(loaded.config["model"]["pool"])
    file.attrs.update(client=client, round=loaded.round, algorithm=label(loaded.config["algorithm"]))
    file.attrs.update(architecture=pool[client % len(pool)], config=json.dumps(loaded.config))
    if loaded.code:
        file[_CODE] = np.frombuffer(json.dumps(loaded.code).encode(), np.uint8)
    if "samples" in loaded.identity:
        file.attrs["samples"] = loaded.identity["samples"]
    server, own = (loaded.state_layout, loaded.state), (loaded.layout(client), vector)
    for layout, values in (server, own):
        tensors.write(file, layout, values)
    if "frozen" in loaded.identity:
        stored = frozen.read(loaded.path, loaded.identity["frozen"])
        for part, kind in stored.of_client(client).items():
            tensors.write(file, Layout.join({part: stored.layouts[kind]}), stored.vectors[kind])


def is_client_file(path: Path) -> bool:
    """Return whether a file was written by `export`."""
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            return h5py.h5a.exists(file.id, b"client")
    except untrusted_hdf5.FROM_HDF5:
        return False


class ClientFile:
    """A file that `export` wrote, open for reading. Use as a context manager.

    Raises:
        CheckpointError: an attribute is missing or of the wrong kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = h5py.File(path, "r", locking="best-effort")
        try:
            self.client, self.round = self._number("client"), self._number("round")
            settings = untrusted_json.parse(self._text("config"), "its attribute 'config'")
            if not isinstance(settings, dict):
                raise UnusableError("its attribute 'config' has no settings")
            self.config = recorded.complete(settings)
            self.samples = self._text("samples")
            self.code = self._code()
        except untrusted_hdf5.FROM_HDF5 as error:
            self._file.close()
            raise self._unfit(error) from error

    def __enter__(self) -> ClientFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _code(self) -> dict[str, str]:
        """Return the user's own files by name."""
        dataset = untrusted_hdf5.find_dataset(self._file, _CODE)
        if dataset is None:
            return {}
        if dataset.dtype != np.uint8 or dataset.ndim != 1 or len(dataset) > _MOST_CODE:
            raise UnusableError(f"{_CODE} is not a text")
        text = untrusted_hdf5.decode_utf8(dataset[()].tobytes(), _CODE)
        return check_code(untrusted_json.parse(text, _CODE))

    def _number(self, name: str) -> int:
        value = untrusted_hdf5.read_attribute(self._file, name, _ATTRIBUTE)
        if not isinstance(value, int | np.integer) or value < 0:
            raise UnusableError(f"its attribute '{name}' is not a natural number")
        return int(value)

    def _text(self, name: str) -> str:
        value = untrusted_hdf5.read_attribute(self._file, name, _ATTRIBUTE)
        if not isinstance(value, str):
            raise UnusableError(f"its attribute '{name}' is missing or not a text")
        return value

    def _unfit(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.path} is not the file of a client's model: {error}", _REMEDY)

    def vector(self, layout: Layout) -> np.ndarray:
        """Return the tensors of a layout one after the other, (layout.size,) float32.

        Raises:
            CheckpointError: a tensor is missing, of another shape or not finite.
        """
        try:
            return tensors.read(self._file, layout)
        except untrusted_hdf5.FROM_HDF5 as error:
            raise self._unfit(error) from error
