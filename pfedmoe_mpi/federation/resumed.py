"""Vectors that stay in the files of checkpoints until their clients train: read when they are needed."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pfedmoe_mpi.checkpoint import Checkpoint, OpenFiles, Places
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.federation.federation import Federation


def begin(federation: Federation, loaded: Checkpoint) -> None:
    """Let this rank's clients have the vectors of a verified checkpoint; not collective.

    Its files stay open, so that another run that removes them does no harm.
    """
    _rely(federation, federation.clients, loaded.places, loaded.files)


def follow(federation: Federation, path: Path, places: Places) -> None:
    """Read what a new checkpoint holds from there, because earlier files may be removed; not collective."""
    relied = federation.store.relied
    if relied.isdisjoint(places.rows["client"].tolist()):
        return
    try:
        files = OpenFiles(path, places.files)
    except CheckpointError:  # this rank alone does not see it yet: it is opened when it is read
        files = OpenFiles(path, ())
    _rely(federation, relied, places, files)


def _rely(federation: Federation, clients: Collection[int], places: Places, files: OpenFiles) -> None:
    """Let those of the clients that have a place be read, best in the order of these places."""
    order = np.lexsort((places.rows["offset"], places.rows["file"]))
    own = [client for client in places.rows["client"][order].tolist() if client in clients]
    federation.store.rely(own, partial(_read, files, places))


def _read(files: OpenFiles, places: Places, client: int) -> torch.Tensor:
    """Return a client's vector.

    Raises:
        OSError: its bytes are missing or have changed. One rank alone finds that, so that it is not an error
            of the user, which all ranks raise together: it ends the job.
    """
    try:
        return torch.from_numpy(files.read(places, places.find(client)))
    except CheckpointError as error:
        raise OSError(str(error)) from error
