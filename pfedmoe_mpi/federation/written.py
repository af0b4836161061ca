"""Which vectors a checkpoint holds itself, and for which it relies on earlier files of its folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from pfedmoe_mpi.checkpoint import Content, Places


class Vectors:
    """What is known of the vectors of all clients: which changed, and where the newest checkpoint has them.

    Args:
        lengths: of every client's vector, in bytes.

    Attributes:
        places: of the vectors in checkpoints; those of clients that have changed since are the earlier ones.
    """

    def __init__(self, lengths: np.ndarray) -> None:
        self._lengths = lengths
        self._changed = np.zeros(len(lengths), bool)
        self.places = Places()

    def change(self, clients: Iterable[int]) -> None:
        """Record that clients have other vectors than before."""
        chosen = list(clients)
        self._changed[chosen] = self._lengths[chosen] > 0

    def written(self, places: Places) -> None:
        """Record that a checkpoint holds the vectors of these clients."""
        self.places = self.places.updated(places)
        self._changed[places.rows["client"]] = False

    def divided(self, path: Path, content: Content) -> Content:
        """Return the content of a checkpoint with the clients whose vectors it holds, and the others' places.

        It holds all of them, and relies on no other file, unless `leans` says otherwise.
        """
        known = self.places.chosen(_usable(self.places, path) & ~self._changed[self.places.rows["client"]])
        trained = self._changed.copy()
        trained[self.places.rows["client"]] = True
        everyone = np.flatnonzero(trained).tolist()
        complete = replace(content, held=everyone, elsewhere=Places())
        fresh = trained.copy()
        fresh[known.rows["client"]] = False
        of_fresh, of_trained = (int(self._lengths[clients].sum()) for clients in (fresh, trained))
        in_files = sum(os.path.getsize(path.with_name(name)) for name in known.files)
        if not leans(content.length_of_others, of_fresh, of_trained, in_files):
            return complete
        return replace(content, held=np.flatnonzero(fresh).tolist(), elsewhere=known)


def leans(others: float, fresh: float, trained: float, in_files: float) -> bool:
    """Return whether a checkpoint relies on earlier files for the vectors that did not change.

    That must make it less than half as long, and at least half of those files must still be needed.

    Args:
        others: bytes of the numbers that are not clients' vectors.
        fresh: bytes of the vectors that it would hold.
        trained: bytes of the vectors of all clients that have trained.
        in_files: bytes of the files on which it would rely.
    """
    shorter = 2 * (others + fresh) < others + trained
    return shorter and 2 * (trained - fresh) >= in_files


def _usable(places: Places, path: Path) -> np.ndarray:
    """Return which places are in files that exist and that the checkpoint at `path` will not replace."""
    usable = [name != path.name and path.with_name(name).is_file() for name in places.files]
    return np.array(usable, bool)[places.rows["file"]]
