"""A file lock that is released when its process ends, however it ends; also on network file systems."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
from pathlib import Path

UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class ReplacedError(OSError):
    """The path of a locked folder leads to another folder now."""


class Lock:
    """A lock on its file's folder, held from construction until `release` or the end of the process."""

    def __init__(self, path: Path, patience: float) -> None:
        """Take the lock; wait up to `patience` seconds for a process that is about to release it.

        Raises:
            BlockingIOError: another process still holds the lock.
            OSError: the file cannot be opened for writing.
        """
        self._path = path
        deadline = time.monotonic() + patience
        while not self._lock_file(path):
            if time.monotonic() > deadline:
                raise BlockingIOError(errno.EWOULDBLOCK, "held by another process", str(path))
            time.sleep(0.2)

    def release(self) -> None:
        """Release the lock; the file stays."""
        os.close(self._file)
        os.close(self._folder)

    def check(self) -> None:
        """Check that the folder's path still leads to the folder of this lock, by device and inode.

        Raises:
            ReplacedError: it leads to another folder.
            OSError: it leads to none.
        """
        folder = self._path.parent
        if not os.path.samestat(os.fstat(self._folder), os.stat(folder)):
            raise ReplacedError(f"{folder} is another folder now: that of this run was moved or replaced")

    def _lock_file(self, path: Path) -> bool:
        """Open and lock the file; return whether it succeeded and the file is still the one at `path`.

        Its folder may have been renamed, and replaced by another, since the file was opened.
        """
        self._folder = os.open(path.parent, os.O_RDONLY)  # while it is open, no other gets its inode
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            os.close(self._folder)
            raise
        if self._try_lock() and _is_at(self._file, path) and _is_at(self._folder, path.parent):
            return True
        self.release()
        return False

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                print("note: this file system has no locks; start only one run per folder", file=sys.stderr)
                return True
            return False
        return True


def _is_at(file: int, path: Path) -> bool:
    """Return whether an open file is the one that the path leads to."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
