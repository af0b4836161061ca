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


class Resumed:
    """The vectors of a rank's clients that are in files of checkpoints, which stay open as long as needed."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._names: frozenset[str] = frozenset()  # of the open files

    def begin(self, loaded: Checkpoint) -> None:
        """Let this rank's clients have the vectors of a verified checkpoint; not collective."""
        self._rely(self._federation.clients, loaded.places, loaded.files)

    def follow(self, path: Path, places: Places) -> None:
        """Close the files that are not needed any more, once a checkpoint is written; not collective.

        Args:
            path: of the checkpoint.
            places: of all vectors, those in it included.
        """
        relied = self._federation.store.relied
        needed = places.chosen(np.isin(places.rows["client"], [*relied]))
        if self._names == frozenset(needed.files):
            return
        try:
            files = OpenFiles(path, needed.files)
        except CheckpointError as error:  # this rank alone does not see one of them now
            if not self._names:  # a fork's vectors, which cannot be read from files that are open
                raise OSError(str(error)) from error
            return
        self._rely(relied, needed, files)

    def _rely(self, clients: Collection[int], places: Places, files: OpenFiles) -> None:
        """Let those of the clients that have a place be read, best in the order of these places."""
        self._names = frozenset(places.files)
        order = np.lexsort((places.rows["offset"], places.rows["file"]))
        own = [client for client in places.rows["client"][order].tolist() if client in clients]
        self._federation.store.rely(own, partial(_read, files, places))


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
