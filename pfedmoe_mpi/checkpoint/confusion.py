"""The clients' confusion matrices in a checkpoint: the counts that are not 0, of the last evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pfedmoe_mpi.storage.untrusted_json import UnusableError

GROUP = "confusion"
NAMES = ("confusion/shape", "confusion/place", "confusion/count")


@dataclass(frozen=True, eq=False)
class Confusion:
    """How often a client's test rows of each class were taken for each class, after `round`.

    `count` (m,) are the numbers above 0, `place` (m,) their places in an array (clients, classes, classes),
    by client, class of the row, and class of the answer; both int64.
    """

    round: int
    clients: int
    classes: int
    place: np.ndarray
    count: np.ndarray

    @classmethod
    def of(cls, round: int, counts: np.ndarray, measured: np.ndarray, clients: int) -> Confusion:
        """Return the matrices (measured, classes, classes) of the `measured` ones of `clients`, ascending."""
        who, label, answer = np.nonzero(counts)
        classes = counts.shape[1]
        place = (measured[who] * classes + label) * classes + answer
        return cls(round, clients, classes, place, counts[who, label, answer])

    def client(self, client: int) -> np.ndarray:
        """Return a client's matrix, int64 (classes, classes)."""
        size = self.classes * self.classes
        first, last = np.searchsorted(self.place, (client * size, (client + 1) * size))
        flat = np.zeros(size, np.int64)
        flat[self.place[first:last] - client * size] = self.count[first:last]
        return flat.reshape(self.classes, self.classes)

    def datasets(self) -> dict[str, np.ndarray]:
        """Return the datasets of a checkpoint."""
        shape = np.array([self.round, self.clients, self.classes], "<i8")
        return dict(zip(NAMES, (shape, self.place.astype("<i8"), self.count.astype("<i8")), strict=True))


def read(numbers: Callable[[str], np.ndarray], clients: int, round: int) -> Confusion:
    """Return the matrices of a checkpoint after `round`.

    Args:
        numbers: returns an int64 dataset of one dimension.

    Raises:
        UnusableError: the datasets contradict each other.
    """
    shape, place, count = map(numbers, NAMES)
    most = 1 << 20  # classes; their square then fits into an int64 with any number of clients
    if len(shape) != 3 or shape[1] != clients or not 0 < shape[2] <= most or not 0 <= shape[0] <= round:
        raise UnusableError(f"{NAMES[0]} is not of an evaluation of its clients")
    sorted_places = len(place) == len(count) and (np.diff(place) > 0).all()
    inside = not len(place) or (place[0] >= 0 and place[-1] // int(shape[2]) ** 2 < clients)
    if not sorted_places or not inside or (count < 1).any():
        raise UnusableError("its confusion matrices are not counts above 0 at ascending places")
    return Confusion(int(shape[0]), clients, int(shape[2]), place, count)
