"""Files that are complete and on disk under their name, or absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Give a complete file its name, replacing what has it, and make both durable."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextmanager
def new_file(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write; at the end it becomes `path`, or is removed after an exception.

    Raises:
        FileExistsError: `path` exists by then, and `replace` is false.
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if not replace and os.path.lexists(path):
            raise FileExistsError(f"{path} exists and is not overwritten")
        publish(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a text file (UTF-8) in one step.

    Raises:
        OSError: it cannot be written; the earlier file is untouched.
    """
    with new_file(path, replace=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
