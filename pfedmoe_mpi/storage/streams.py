"""Standard output and error that never end a command: closed ones, readers that leave, full disks."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class Output(io.FileIO):
    """A standard stream whose writes go nowhere after one has failed; the reader of a pipe may leave.

    So every rank goes on to its next exchange, and a run to its end: its results are in files.
    """

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError):
                self.failure = error
            return len(data)


def open_standard() -> Output:
    """Replace the standard streams; return what standard output writes to.

    A closed one is opened on the null device: otherwise the next file would get its number, and with it what
    libraries print.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    output = Output(1, "w", closefd=False)
    sys.stdout = _text(output, sys.stdout)
    sys.stderr = _text(Output(2, "w", closefd=False), sys.stderr)
    return output


def _text(output: Output, like: Any) -> io.TextIOWrapper:
    """Return a text stream like Python's own, which is None where it was closed."""
    return io.TextIOWrapper(
        io.BufferedWriter(output),
        encoding=getattr(like, "encoding", "utf-8"),
        errors="backslashreplace" if output.fileno() == 2 else getattr(like, "errors", None),
        line_buffering=getattr(like, "line_buffering", False),
        write_through=getattr(like, "write_through", False),
    )
