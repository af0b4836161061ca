"""The files of a checkpoint, open: they can be read until the end, even if a run removes or replaces them."""

from __future__ import annotations

import os
import resource
import weakref
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from pfedmoe_mpi.checkpoint import folder, places, seal
from pfedmoe_mpi.checkpoint.places import Places
from pfedmoe_mpi.errors import CheckpointError

_REMEDY = (
    "copy that file, too; or, where both are, write a complete one: python -m pfedmoe_mpi pack {path} OUT.h5"
)


class OpenFiles:
    """Files with the vectors of a checkpoint, by name; closed when nothing refers to this object any more.

    They take at most half of the files that this process may have open. Any others are opened when they are
    read, and so must stay.

    Args:
        path: of the checkpoint; the files are beside it, or beside what its link points to.

    Raises:
        CheckpointError: a file is missing.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path = path
        self._files: dict[str, int] = {}
        weakref.finalize(self, _close, self._files)
        self._open_all(names)

    def read(self, known: Places, row: Any) -> np.ndarray:
        """Return a client's vector, float32, from its place; several threads may do so.

        Raises:
            CheckpointError: the file is missing, or the bytes are others.
        """
        name = known.files[row["file"]]
        is_open = name in self._files
        file = self._files[name] if is_open else self._open(name)
        try:
            data = _bytes(file, int(row["offset"]), int(row["length"]))
        except OSError as error:
            raise self._error(name, error) from error
        finally:
            if not is_open:
                os.close(file)
        if sha256(data.data).digest() != row["sha256"].tobytes():
            own = name == self.path.name
            where = f"{self.path} is damaged:" if own else f"{self.path} relies on {name}, where"
            problem = f"{where} the bytes of clients/{row['client']:06d} have changed"
            raise CheckpointError(problem, seal.REMEDY)
        return data.view("<f4")

    def _open_all(self, names: Iterable[str]) -> None:
        missing = [name for name in names if name not in self._files]
        for name in missing[: _most_open(len(missing))]:
            self._files[name] = self._open(name)

    def _open(self, name: str) -> int:
        try:
            return seal.without_waiting(str(places.file_of(self.path, name)), os.O_RDONLY)
        except OSError as error:
            raise self._error(name, error) from error

    def _error(self, name: str, error: OSError) -> CheckpointError:
        problem = f"{self.path} relies on {name} in its folder, which cannot be read: {error.strerror}"
        return CheckpointError(problem, _REMEDY.format(path=self.path))


class Opened(OpenFiles):
    """A checkpoint's own file, open as `file`, and those on which it relies, after `open_others`.

    Attributes:
        seal: what it says, which is not compared with the bytes yet.
        elsewhere: where the vectors in other files lie.

    Raises:
        CheckpointError: the file is missing, or not a checkpoint.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, ())
        with seal.errors(path):
            self._files[path.name] = seal.without_waiting(str(path), os.O_RDONLY)
            self.file = open(self._files[path.name], "rb", closefd=False)  # noqa: SIM115 (open until the end)
            self.seal = seal.read(self.file, path)
            self.elsewhere = places.read(self.file, self.seal, path)

    def open_others(self) -> None:
        """Open the files on which the checkpoint relies.

        Raises:
            CheckpointError: one is missing.
        """
        self._open_all(self.elsewhere.files)

    @property
    def replaced(self) -> bool:
        """Whether another file, or none, has this path now."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._files[self.path.name]))
        except OSError:
            return True

    def check(self, rank: int = 0, ranks: int = 1) -> None:
        """Compare this rank's share of the bytes with the seal, and of those elsewhere with their digests.

        Raises:
            CheckpointError: bytes have changed; the message names the dataset.
        """
        with seal.errors(self.path):
            seal.check(self.file, self.seal, self.path, rank, ranks)
        rows = self.elsewhere.rows
        for row in rows[np.lexsort((rows["offset"], rows["file"]))[rank::ranks]]:
            self.read(self.elsewhere, row)


def open_files(path: Path) -> Opened:
    """Open a checkpoint and all files on which it relies.

    A run removes those only after it has removed or replaced the checkpoint, which is opened again then; or
    when newer ones need vectors of it and nothing else.

    Raises:
        CheckpointError: a file is missing, or the first one is not a checkpoint.
    """
    while True:
        try:
            opened = Opened(path)
        except CheckpointError as error:
            newest = _newest(path) if isinstance(error.__cause__, FileNotFoundError) else None
            if newest is None:
                raise
            remedy = f"check the path; the newest checkpoint there is {newest.name}"
            raise CheckpointError(error.problem, remedy) from error
        try:
            opened.open_others()
        except CheckpointError as error:
            if opened.replaced:
                continue
            newest = _newest(path)
            if newest is None or newest == path:
                raise
            raise CheckpointError(error.problem, f"use {newest}, with which its run has gone on") from error
        return opened


def _newest(path: Path) -> Path | None:
    """Return the newest checkpoint of a folder that relies on no missing file."""
    return next(iter(folder.restart_points(path.parent)), None)


def _close(files: dict[str, int]) -> None:
    for file in files.values():
        os.close(file)


def _most_open(wanted: int) -> int:
    """Return how many of so many files may be opened, after raising this process's limit where it can be."""
    kind, unlimited = resource.RLIMIT_NOFILE, resource.RLIM_INFINITY
    soft, hard = resource.getrlimit(kind)
    needed = 2 * (wanted + _open_now())
    if soft != unlimited and soft < needed:
        with suppress(OSError, ValueError):
            resource.setrlimit(kind, (needed if hard == unlimited else min(needed, hard), hard))
        soft = resource.getrlimit(kind)[0]
    return wanted if soft == unlimited else max(0, soft // 2 - _open_now())


def _open_now() -> int:
    """Return how many files this process has open, 0 where that is unknown."""
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 0


def _bytes(file: int, offset: int, length: int) -> np.ndarray:
    """Return bytes of an open file, none if it ends before them."""
    is_there = offset + length <= os.fstat(file).st_size
    data = np.empty(length if is_there else 0, np.uint8)
    done = 0
    while done < len(data):
        step = os.preadv(file, [data[done:].data], offset + done)
        if not step:  # it has become shorter
            return data[:0]
        done += step
    return data
