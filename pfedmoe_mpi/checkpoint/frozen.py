"""The frozen tensors of a run, which no vector holds: once in the run folder, as `frozen/DIGEST.h5`.

Tensors are datasets `/KIND/TENSOR`, where KIND is what parts of equal architecture have in common.
`/facts.json` holds their layout, and the kinds of the server's parts and of every client's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi.checkpoint import tensors
from pfedmoe_mpi.checkpoint.sealed_file import parse_layout
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.storage import durable, untrusted_hdf5, untrusted_json
from pfedmoe_mpi.storage.untrusted_json import UnusableError

FOLDER = "frozen"
_FACTS = "facts.json"
_MOST_FACTS = 1 << 26  # bytes


@dataclass(frozen=True)
class Frozen:
    """The frozen vectors of a run by kind, float32 (layout.size,), and their layouts.

    `server` is the kind of each of the server's parts that has frozen tensors; `clients` lists, by private
    part, the kinds of clients 0, 1, …, and starts again where it ends.
    """

    layouts: Mapping[str, Layout]
    vectors: Mapping[str, np.ndarray]
    server: Mapping[str, str]
    clients: Mapping[str, Sequence[str]]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the layouts and the values, in hexadecimal; empty if nothing is frozen."""
        if not self.layouts:
            return ""
        digest = sha256(Layout.join(self.layouts).to_json().encode())
        for kind in self.layouts:
            digest.update(self.vectors[kind].data)
        return digest.hexdigest()

    def of_client(self, client: int) -> dict[str, str]:
        """Return the kinds of the server's and a client's parts that have frozen tensors, by part."""
        own = {part: kinds[client % len(kinds)] for part, kinds in self.clients.items()}
        return {part: kind for part, kind in {**self.server, **own}.items() if kind in self.layouts}


NOTHING = Frozen({}, {}, {}, {})


def write(folder: Path, frozen: Frozen) -> None:
    """Write the frozen tensors into a run folder, if there are any and they are not there.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = folder / FOLDER / f"{frozen.digest}.h5"
    if not frozen.digest or path.is_file():
        return
    layout = Layout.join(frozen.layouts).to_json()
    facts = json.dumps({"layout": layout, "server": frozen.server, "clients": frozen.clients})
    try:
        path.parent.mkdir(exist_ok=True)
        with durable.new_file(path) as temporary, h5py.File(temporary, "w") as file:
            file[_FACTS] = np.frombuffer(facts.encode(), np.uint8)
            for kind, one in frozen.layouts.items():
                tensors.write(file, Layout.join({kind: one}), frozen.vectors[kind])
    except (OSError, RuntimeError, ValueError) as error:  # tensors may have impossible names
        problem = f"the frozen tensors cannot be written to {path}: {error}"
        raise CheckpointError(problem, "free space, or use another folder with --run.dir NEW") from error


def read(checkpoint: Path, digest: str) -> Frozen:
    """Return the frozen tensors of a checkpoint, which are in its run folder, or in `frozen` beside it.

    If the checkpoint is a link, they may be there or where it points to.

    Raises:
        CheckpointError: they are not there, or damaged.
    """
    name = f"{FOLDER}/{digest}.h5"
    paths = (checkpoint.absolute(), checkpoint.resolve())
    places = [folder / name for path in dict.fromkeys(paths) for folder in path.parents[:2]]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        problem = f"{checkpoint} needs its frozen tensors, and there is no {places[-1]}"
        raise CheckpointError(problem, f"copy the run folder's {FOLDER} beside the checkpoint")
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            found = _read(file)
    except untrusted_hdf5.FROM_HDF5 as error:
        problem = f"{path} does not hold the frozen tensors of {checkpoint}: {error}"
        raise CheckpointError(problem, "copy the file from the run folder again") from error
    if found.digest != digest:
        problem = f"{path} is damaged: its digest is {found.digest}"
        raise CheckpointError(problem, "copy the file from the run folder again")
    return found


def _read(file: Any) -> Frozen:
    dataset = untrusted_hdf5.find_dataset(file, _FACTS)
    if dataset is None or dataset.dtype != np.uint8 or dataset.ndim != 1 or len(dataset) > _MOST_FACTS:
        raise UnusableError(f"{_FACTS} is not a text")
    facts = untrusted_json.parse(untrusted_hdf5.decode_utf8(dataset[()].tobytes(), _FACTS), _FACTS)
    if not isinstance(facts, dict) or not isinstance(facts.get("layout"), str):
        raise UnusableError(f"{_FACTS} has no layout")
    joined = parse_layout(facts["layout"])
    server, clients = facts.get("server"), facts.get("clients")
    if (
        not isinstance(server, dict)
        or not isinstance(clients, dict)
        or not all(map(_is_list, clients.values()))
    ):
        raise UnusableError(f"{_FACTS} has no kinds")
    if not _is_list([*server.values(), ""]):
        raise UnusableError(f"{_FACTS} has kinds that are not texts")
    layouts = {kind: joined.part(kind) for kind in joined.parts}
    vectors = {kind: tensors.read(file, Layout.join({kind: one})) for kind, one in layouts.items()}
    return Frozen(layouts, vectors, server, clients)


def _is_list(value: Any) -> bool:
    """Return whether a value is a list of texts that is not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
