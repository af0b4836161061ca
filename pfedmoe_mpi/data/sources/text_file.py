"""Reading a user's text file; an error names file, line and remedy."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

from pfedmoe_mpi.errors import DataError

_BLOCK = 1 << 20  # bytes


def read_text(path: Path) -> str:
    """Return the file's text, without a byte order mark.

    Raises:
        DataError: the file cannot be read, is empty, or is not UTF-8; names the first line that is not.
    """
    with _readable(path):
        text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise DataError(f"{path} is empty", "add rows, or remove the file")
    return text


def read_lines(path: Path, longest: int) -> Iterator[str]:
    r"""Yield the lines of a file with their ends (\n, \r or \r\n), without a byte order mark.

    At most `longest` + 1 characters of a line are yielded at once.

    Raises:
        DataError: the file cannot be read, or is not UTF-8; names the first line that is not.
    """
    with _readable(path), open(path, encoding="utf-8-sig", newline="") as file:
        while line := file.readline(longest + 1):
            yield line


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn the errors of reading a text file into DataErrors."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check --data.path") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error


def _not_utf8(path: Path) -> DataError:
    """Return the error about a file that is not UTF-8; it names the first line that is not."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line, likely = 1, "LATIN1"
    with open(path, "rb") as file:
        for block in chain(iter(partial(file.read, _BLOCK), b""), [b""]):
            if line == 1 and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                likely = "UTF-16"
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                return DataError(
                    f"{path}, line {line}: byte {error.object[error.start]:#04x} is not UTF-8",
                    f"store the file as UTF-8: iconv -f {likely} -t UTF-8 FILE > NEW_FILE",
                )
            line += block.count(b"\n")
    return DataError(f"{path} changed while it was read", "run the command again")
