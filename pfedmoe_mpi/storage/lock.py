"""A lock on a file that ends with the process that holds it, however that ends, over file servers too."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
from pathlib import Path

UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Lock:
    """Held from its construction until `release` or the end of the process."""

    def __init__(self, path: Path, patience: float) -> None:
        """Take it, waiting `patience` seconds for a holder that is about to disappear.

        Raises:
            BlockingIOError: another process holds it.
            OSError: the file cannot be opened for writing.
        """
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + patience
        while not self._taken():
            if time.monotonic() > deadline:
                self.release()
                raise BlockingIOError(errno.EWOULDBLOCK, "held by another process", str(path))
            time.sleep(0.2)

    def release(self) -> None:
        """Give it up; the file stays."""
        os.close(self._file)

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                print("note: this file system has no locks; start one run per folder", file=sys.stderr)
                return True
            return False
        return True
