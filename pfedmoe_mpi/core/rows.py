"""Row numbers of many clients in two arrays, not in one array for each client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np


class Rows(Sequence[np.ndarray]):
    """The row numbers of clients 0, 1, …: client k's are `flat[offsets[k] : offsets[k + 1]]`, int64."""

    def __init__(self, flat: np.ndarray, offsets: np.ndarray) -> None:
        self.flat = flat
        self.offsets = offsets

    @classmethod
    def of(cls, clients: Sequence[np.ndarray]) -> Rows:
        """Return the rows of several clients; the argument itself if it is one already."""
        if isinstance(clients, Rows):
            return clients
        flat = np.concatenate([np.empty(0, np.int64), *clients])
        return cls(flat, np.cumsum([0, *map(len, clients)]).astype(np.int64))

    @property
    def sizes(self) -> np.ndarray:
        """The number of rows of each client, (N,)."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> np.ndarray:
        """The client of each of `flat`."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        ends = self.offsets.tolist()
        return (self.flat[start:end] for start, end in pairwise(ends))

    @overload
    def __getitem__(self, client: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, client: slice) -> Rows: ...
    def __getitem__(self, client: int | slice) -> np.ndarray | Rows:
        if isinstance(client, slice):
            return Rows.of(list(self)[client])
        number = client + len(self) if client < 0 else client
        if not 0 <= number < len(self):
            raise IndexError(client)
        return self.flat[self.offsets[number] : self.offsets[number + 1]]


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the numbers of several ranges, one after the other; range i begins at starts[i]."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())
