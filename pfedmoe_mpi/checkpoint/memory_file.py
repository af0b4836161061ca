"""A sparse file in memory: it takes only the space of what was written to it, however long it is.

HDF5 lays a checkpoint out here and not on the disk. On a full disk its library would keep the file open, so
that the space stays in use, and would report errors where Python cannot catch them. A plain write fails once
and cleanly.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PAGE = 1 << 16


class SparseFile(io.RawIOBase):
    """A file in memory, to be read, written and sought; `save` writes it to the disk."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._length = self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def truncate(self, length: int | None = None) -> int:
        self._length = self._at if length is None else length
        return self._length

    def _stretches(self, length: int) -> Iterator[tuple[slice, int, slice]]:
        """Yield (slice of the caller's bytes, page, slice of the page) for the next bytes, and move on."""
        done = 0
        while done < length:
            page, start = divmod(self._at, _PAGE)
            step = min(_PAGE - start, length - done)
            yield slice(done, done + step), page, slice(start, start + step)
            done, self._at = done + step, self._at + step

    def write(self, data: Any) -> int:
        for outside, page, inside in self._stretches(len(data)):
            self._pages.setdefault(page, bytearray(_PAGE))[inside] = data[outside]
        self._length = max(self._length, self._at)
        return len(data)

    def readinto(self, data: Any) -> int:
        for outside, page, inside in self._stretches(len(data)):
            data[outside] = self._pages.get(page, bytearray(_PAGE))[inside]
        return len(data)

    def save(self, path: Path) -> None:
        """Write the file, with holes where nothing was written."""
        with open(path, "wb") as file:
            for page, data in sorted(self._pages.items()):
                file.seek(page * _PAGE)
                file.write(data)
            file.truncate(self._length)
