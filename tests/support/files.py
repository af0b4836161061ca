"""Digests of files, and damage to them."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path


def path_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's names and files."""
    if path.is_file():
        return sha256(path.read_bytes()).hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file())
    lines = "".join(f"{p.relative_to(path)} {path_digest(p)}\n" for p in files)
    return sha256(lines.encode(errors="surrogateescape")).hexdigest()


def flip_bit(path: Path, place: int, bit: int = 4) -> None:
    """Flip one bit of the byte at `place`; a negative place counts from the end."""
    with open(path, "r+b") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << bit]))
