"""Reading a user's text file; an error names file, line and remedy."""

from __future__ import annotations

from pathlib import Path

from pfedmoe_mpi.errors import DataError


def read_text(path: Path) -> str:
    """Return the file's text, without a byte order mark.

    Raises:
        DataError: the file cannot be read, is empty, or is not UTF-8; names the first line that is not.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check --data.path") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        likely = "UTF-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "LATIN1"
        raise DataError(
            f"{path}, line {line}: byte {raw[error.start]:#04x} is not UTF-8",
            f"store the file as UTF-8: iconv -f {likely} -t UTF-8 FILE > NEW_FILE",
        ) from error
    if not text.strip():
        raise DataError(f"{path} is empty", "add rows, or remove the file")
    return text
