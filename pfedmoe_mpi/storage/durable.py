"""Files that are either complete and on disk under their name, or absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Rename a complete file to `path`, replacing any file there; make its bytes and its name durable."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` at the end, remove it after an exception.

    Raises:
        FileExistsError: `path` exists at the end.
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with removed_after_error(temporary):
        yield temporary
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists and is not overwritten")
        publish(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Replace a text file (UTF-8) in one step; only one process at a time may do so.

    The temporary file has the same name every time, so that one left by a killed process is overwritten.

    Raises:
        OSError: the file cannot be written; an earlier file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with removed_after_error(temporary):
        temporary.write_text(text, encoding="utf-8")
        publish(temporary, path)


@contextmanager
def removed_after_error(temporary: Path) -> Iterator[None]:
    """Remove a file if the block ends with an exception."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
