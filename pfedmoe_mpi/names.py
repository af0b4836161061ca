"""Names and paths that are not whole text: no configuration, checkpoint or page could hold them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pfedmoe_mpi.errors import ConfigError, UserError


def check_text(what: str, text: str, error: type[UserError]) -> None:
    """Raise `error` if a text hides bytes that the system's encoding does not have."""
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        byte = ord(text[fault.start]) & 0xFF
        problem = f"{what} '{text}' holds the byte {byte:#04x}, which is not {_encoding()}"
        raise error(problem, _remedy()) from fault


def check_path(what: str, path: str, error: type[UserError]) -> None:
    """Raise `error` if a path is not whole text, or cannot be a path on this system."""
    check_text(what, path, error)
    if "\0" in path:
        raise error(f"{what} {path!r} holds a NUL character", "remove it")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as fault:
        problem = f"{what} '{path}' cannot be a path, because this locale's encoding is {_encoding()}"
        raise error(problem, _remedy()) from fault


def check_reachable(folder: Path, error: type[UserError]) -> None:
    """Raise `error` if the system cannot say what is in a folder, or whether there is one.

    Permission is lacking, or the path is longer than a path can be; `Path.exists` raises an OSError then.
    """
    try:
        os.stat(os.path.join(folder, "."))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as fault:
        problem = f"{folder} cannot be reached: {fault.strerror}"
        raise error(problem, "check the path, and your permissions there") from fault


def expanded(path: str) -> Path:
    """Return a path with the home folder that a `~` at its beginning stands for.

    Raises:
        ConfigError: there is no such user, or the system knows no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as fault:
        user = path.partition("/")[0]
        raise ConfigError(f"{path}: there is no home folder {user}", "write the path from / on") from fault


def _encoding() -> str:
    return sys.getfilesystemencoding().upper()


def _remedy() -> str:
    if _encoding() != "UTF-8":
        return "export PYTHONUTF8=1"
    return "rename it, for example with convmv -f LATIN1 -t UTF-8 --notest NAME"
