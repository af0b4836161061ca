"""The private vectors of a rank's clients: drawn, in a checkpoint, in memory, or in a scratch file.

A client that never trained has no vector: it begins with one that is a pure function of its number, and that
is drawn when it is asked for. One that has not trained since a restart is read from a checkpoint. Vectors of
clients that trained stay in memory up to the budget `run.memory`; beyond it those that were replaced longest
ago go to a file in `run.scratch`. Drawn and read vectors take a part of the budget, as long as no others need
it. The file has no name, so that nothing is left of it however the program ends. No bit of a run depends on
the budget.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfedmoe_mpi.errors import RunError
from pfedmoe_mpi.mpi.comm import Comm

PAGE = 4096  # bytes; vectors take whole pages in memory and in the file
DRAWN = 0.25  # of the budget, at most, is for drawn and read vectors: they save time and not disk


class Store:
    """The vectors of a rank's clients, float32 on the CPU, by the client's number.

    Args:
        draw: returns the vector with which a client begins.
        budget: bytes of memory.
        folder: of the scratch file; it must exist once the budget is used up.
    """

    def __init__(self, draw: Callable[[int], Tensor], budget: float, folder: Path) -> None:
        self.budget = budget
        self.folder = folder
        self.problem = ""  # why vectors beyond the budget had to stay in memory
        self._draw = draw
        self._trained: dict[int, Tensor] = {}  # in memory, the one replaced longest ago first
        self._relied: dict[int, Callable[[int], Tensor]] = {}  # what reads a vector from elsewhere
        self._drawn: dict[int, Tensor] = {}  # or read: what can be had again
        self._bytes = self._drawn_bytes = 0  # of both in memory, and of those that can be had again
        self._file = _ScratchFile()
        self._ahead: dict[int, Future[Tensor]] = {}  # vectors that are being read
        self._reader: ThreadPoolExecutor | None = None

    def holds(self, client: int) -> bool:
        """Return whether `put` or `rely` was called for a client; the others' vectors are drawn."""
        return client in self._trained or client in self._file or client in self._relied

    def rely(self, clients: Iterable[int], read: Callable[[int], Tensor]) -> None:
        """Leave vectors where they are until these clients train.

        Args:
            clients: in the order in which they are best read.
            read: returns the vector of one of them; it may be called in another thread.
        """
        for client in clients:
            self.forget(client)
            self._relied[client] = read

    @property
    def relied(self) -> Set[int]:
        """The clients whose vectors are elsewhere."""
        return self._relied.keys()

    def get(self, client: int) -> Tensor:
        """Return a client's vector, which may not be changed."""
        if client in self._trained:
            return self._trained[client]
        if client in self._file:
            return self._read(client)
        if client not in self._drawn:
            vector = self._read(client) if client in self._relied else self._draw(client)
            spare = min(self.budget - self._bytes, DRAWN * self.budget - self._drawn_bytes)
            if _length(vector) > spare:
                return vector
            self._drawn[client] = vector
            self._bytes += _length(vector)
            self._drawn_bytes += _length(vector)
        return self._drawn[client]

    def values(self, client: int) -> np.ndarray:
        """Return a client's vector as an array."""
        return self.get(client).numpy()

    def put(self, client: int, vector: Tensor) -> None:
        """Keep a copy of the vector that a client has trained, as `take` keeps one."""
        self.take(client, buffer(vector.numel()).copy_(vector))

    def take(self, client: int, vector: Tensor) -> None:
        """Keep the vector that a client has trained, in a `buffer` that nobody changes any more.

        If the scratch file cannot be written, the vector stays in memory, and `problem` says why.
        """
        if not vector.numel():
            return
        self._ahead.pop(client, None)
        self._relied.pop(client, None)
        self._forget_drawn(client)
        before = self._trained.pop(client, None)
        if before is None:
            self._bytes += _length(vector)
            self._file.remove(client)  # another vector takes its place there
        self._trained[client] = vector
        self._make_space()

    def forget(self, client: int) -> None:
        """Remove the vector of a client that was here for a round."""
        self._ahead.pop(client, None)
        self._relied.pop(client, None)
        self._forget_drawn(client)
        vector = self._trained.pop(client, None)
        self._bytes -= _length(vector) if vector is not None else 0
        self._file.remove(client)

    def forget_drawn(self) -> None:
        """Draw all clients that have not trained again: they begin with other values now."""
        for client in list(self._drawn):
            self._forget_drawn(client)

    def walk(self, clients: Iterable[int]) -> Iterator[int]:
        """Yield clients so that few are read from files twice, and read the next one meanwhile."""
        chosen = dict.fromkeys(clients)  # an ordered set
        stored = [client for client in self._relied if client in chosen and client not in self._drawn]
        stored += self._file.in_order(client for client in chosen if client not in self._trained)
        in_file = {*stored}
        yield from (client for client in chosen if client not in in_file)
        for number, client in enumerate(stored):
            self._reader = self._reader or ThreadPoolExecutor(1)
            for wanted in stored[number : number + 2]:
                read = self._relied.get(wanted, self._file.read if wanted in self._file else None)
                if read and wanted not in self._ahead:
                    self._ahead[wanted] = self._reader.submit(read, wanted)
            yield client
            self._ahead.pop(client, None)
        self._ahead.clear()

    def _read(self, client: int) -> Tensor:
        """Return a vector that is elsewhere or in the file."""
        if client in self._ahead:
            return self._ahead[client].result()
        return self._relied.get(client, self._file.read)(client)

    def _forget_drawn(self, client: int) -> None:
        vector = self._drawn.pop(client, None)
        if vector is not None:
            self._bytes -= _length(vector)
            self._drawn_bytes -= _length(vector)

    def _make_space(self) -> None:
        """Keep to the budget: drop drawn vectors, then move trained ones to the file."""
        while self._bytes > self.budget and self._drawn:
            self._forget_drawn(next(iter(self._drawn)))
        while self._bytes > self.budget and self._trained and not self.problem:
            client, vector = next(iter(self._trained.items()))
            try:
                self._file.write(client, vector, self.folder)
            except OSError as error:
                self.problem = f"{error.strerror or error}: {self.folder}"
                return
            del self._trained[client]
            self._bytes -= _length(vector)


def check(comm: Comm, store: Store) -> None:
    """Check that the vectors beyond the memory budget found a place; collective.

    Raises:
        RunError: on all ranks: they did not on one of them.
    """
    problems = comm.gather(store.problem, "scratch folders")
    if any(problems):
        rank, problem = next(found for found in enumerate(problems) if found[1])
        raise RunError(
            f"rank {rank} cannot write clients' vectors to the scratch folder: {problem}",
            "free space there; then `restart RUN_DIR`, with --run.scratch FOLDER for another folder, or "
            "with a larger --run.memory, resumes the run",
        )


class _ScratchFile:
    """A file without a name: one stretch of whole pages per client, written and read in place."""

    def __init__(self) -> None:
        self._file: Any = None
        self._places: dict[int, tuple[int, int]] = {}  # offset in bytes, and numbers
        self._free: dict[int, list[int]] = {}  # offsets of stretches in no use, by their length
        self._end = 0

    def __contains__(self, client: int) -> bool:
        return client in self._places

    def in_order(self, clients: Iterable[int]) -> list[int]:
        """Return those of the clients that are in the file, in its order."""
        return sorted((client for client in clients if client in self._places), key=self._places.__getitem__)

    def write(self, client: int, vector: Tensor, folder: Path) -> None:
        """Write a client's vector, which is the start of a buffer of whole pages."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (open until the end)
        data = _pages(vector)
        if client in self._places:
            offset = self._places[client][0]
        else:
            free = self._free.get(len(data))
            offset = free.pop() if free else self._end
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], offset + done)
        except OSError:
            if client not in self._places and offset < self._end:
                self._free[len(data)].append(offset)
            raise
        self._end = max(self._end, offset + len(data))
        self._places[client] = offset, vector.numel()

    def read(self, client: int) -> Tensor:
        """Return a client's vector in a buffer of whole pages."""
        offset, numbers = self._places[client]
        vector = buffer(numbers)
        data = _pages(vector)
        done = 0
        while done < len(data):
            step = os.preadv(self._file.fileno(), [data[done:]], offset + done)
            if not step:
                raise OSError(f"the scratch file ends before the vector of client {client}")
            done += step
        return vector

    def remove(self, client: int) -> None:
        """Give the stretch of a client up."""
        if client in self._places:
            offset, numbers = self._places.pop(client)
            self._free.setdefault(_rounded(4 * numbers), []).append(offset)


def buffer(numbers: int) -> Tensor:
    """Return a vector (numbers,), without values yet, at the start of a buffer of whole pages."""
    whole = torch.empty(_rounded(4 * numbers) // 4)
    whole[numbers:] = 0
    return whole[:numbers]


def _pages(vector: Tensor) -> memoryview:
    """Return the bytes of the buffer of whole pages that begins with this vector."""
    whole = vector.as_strided((_rounded(4 * vector.numel()) // 4,), (1,))
    return memoryview(whole.numpy().view(np.uint8).data)


def _rounded(length: int) -> int:
    return -(-length // PAGE) * PAGE


def _length(vector: Tensor) -> int:
    """Return the bytes of memory of a vector."""
    return 4 * vector.numel()
