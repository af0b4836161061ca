"""Vectors that stay in the files of checkpoints until their clients train: read when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pfedmoe_mpi.checkpoint import Checkpoint, Places
from pfedmoe_mpi.checkpoint.places import read_vector
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.federation.federation import Federation


def begin(federation: Federation, loaded: Checkpoint) -> None:
    """Let this rank's clients have the vectors of a verified checkpoint; not collective.

    Its own file stays open, so that another run that removes it does no harm.
    """
    path, places = loaded.path, loaded.places
    file = open(path, "rb", buffering=0)  # noqa: SIM115 (open as long as a vector may be read from it)

    def read(client: int) -> np.ndarray:
        row = places.find(client)
        return read_vector(path, places, row, file if places.files[row["file"]] == path.name else None)

    _rely(federation, federation.clients, places, read)


def follow(federation: Federation, path: Path, places: Places) -> None:
    """Read what a new checkpoint holds from there, because earlier files may be removed; not collective."""

    def read(client: int) -> np.ndarray:
        return read_vector(path, places, places.find(client))

    _rely(federation, federation.store.relied, places, read)


def _rely(
    federation: Federation, clients: Collection[int], places: Places, read: Callable[[int], np.ndarray]
) -> None:
    """Let those of the clients that have a place be read, best in the order of these places."""
    order = np.lexsort((places.rows["offset"], places.rows["file"]))
    own = [client for client in places.rows["client"][order].tolist() if client in clients]
    federation.store.rely(own, partial(_read, read))


def _read(read: Callable[[int], np.ndarray], client: int) -> torch.Tensor:
    """Return a client's vector.

    Raises:
        OSError: its bytes are missing or have changed. One rank alone finds that, so that it is not an error
            of the user, which all ranks raise together: it ends the job.
    """
    try:
        return torch.from_numpy(read(client))
    except CheckpointError as error:
        raise OSError(str(error)) from error
