"""HDF5 files that anyone may have written: what may be touched of them, found out before anything is read.

A link can lead out of the file or in a circle, a dataset can lie in other files or be put together from them,
and a few bytes can claim terabytes. Only datasets that lie in the file itself, behind hard links, are used.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

FROM_HDF5 = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, UnicodeError)
_HEAP, _OBJECT = struct.Struct("<Q"), struct.Struct("<H6xQ")  # length; number and length
_SEARCHED = 2 << 30  # bytes of a file looked through for heaps
_LONE = re.compile(r"\\u[dD][89a-fA-F]")


class UnfitError(ValueError):
    """What is wrong with an object of a file, in words that follow the file's name."""


def find(file: Any, key: str) -> Any:
    """The dataset at a path of hard links, lying in this file; None if there is none.

    Raises:
        UnfitError: a link or a dataset that leads elsewhere, or something that is no dataset.
    """
    group = file
    *parents, last = key.split("/")
    for number, name in enumerate([*parents, last]):
        raw = name.encode()
        if not group.id.links.exists(raw):
            return None
        if group.id.links.get_info(raw).type != h5py.h5l.TYPE_HARD:
            raise UnfitError(f"{key} is a link and not stored here")
        kind = group.get(name, getclass=True)
        if kind is not (h5py.Group if number < len(parents) else h5py.Dataset):
            raise UnfitError(f"{key} is no dataset")
        group = group[name]
    plan = group.id.get_create_plist()
    if plan.get_layout() == h5py.h5d.VIRTUAL:
        raise UnfitError(f"{key} is virtual: its values lie elsewhere")
    if plan.get_layout() == h5py.h5d.CONTIGUOUS and plan.get_external_count():
        raise UnfitError(f"{key} lies in external files")
    if group.shape is None:
        raise UnfitError(f"{key} holds nothing")
    return group


def attribute(owner: Any, name: str, limit: int) -> Any:
    """A number, a text or an array of numbers; None if there is none.

    Raises:
        UnfitError: more than `limit` bytes, or anything else: references, structures, lists of unlike length.
    """
    if not h5py.h5a.exists(owner.id, name.encode()):
        return None
    found = h5py.h5a.open(owner.id, name.encode())
    kind = found.get_type()
    numbers = (h5py.h5t.TypeIntegerID, h5py.h5t.TypeFloatID, h5py.h5t.TypeEnumID)
    text = isinstance(kind, h5py.h5t.TypeStringID) and found.shape == ()
    if found.shape is None or not (text or isinstance(kind, numbers)):
        raise UnfitError(f"its attribute '{name}' is neither text nor numbers")
    if found.get_storage_size() > limit:
        raise UnfitError(f"its attribute '{name}' is longer than {limit} bytes")
    value = owner.attrs[name]
    if text:
        what = f"its attribute '{name}'"
        value = whole(value, what) if isinstance(value, str) else decoded(bytes(value), what)
    return value


def decoded(raw: bytes, what: str) -> str:
    """UTF-8 as text."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UnfitError(f"{what} is not UTF-8") from error


def whole(text: str, what: str) -> str:
    """The text, unless bytes that were no characters are hidden in it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnfitError(f"{what} is not UTF-8") from error
    return text


def parsed(text: str, what: str) -> Any:
    """JSON with finite numbers and whole characters only."""

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"the number {digits}")
        return value

    try:
        value = json.loads(text, parse_float=number, parse_constant=number)
        if _LONE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UnfitError(f"{what} is not JSON: {error}") from error
    return value


def check_heaps(file: Any, path: Path) -> None:
    """Walk the heaps of texts of any length as HDF5 will, which never ends where an object has no length.

    Raises:
        OSError: an object that is shorter than its own head, or longer than its heap.
    """
    if file.id.get_create_plist().get_sizes() != (8, 8):
        return
    with open(path, "rb") as raw:
        for start in _places(raw, b"GCOL\1\0\0\0"):
            at, end = start + 16, start + _HEAP.unpack(os.pread(raw.fileno(), 8, start + 8))[0]
            while at + _OBJECT.size <= end and len(head := os.pread(raw.fileno(), _OBJECT.size, at)) == 16:
                number, length = _OBJECT.unpack(head)
                taken = (
                    16 + -(-length // 8) * 8 if number else length
                )  # number 0 is what is free, head included
                if not 16 <= taken <= end - at:
                    raise OSError(f"its heap at byte {start} is damaged")
                at += taken


def _places(file: Any, sign: bytes) -> Iterator[int]:
    """Where these bytes stand in a file, as far as it is looked through."""
    at, tail = 0, b""
    while at < _SEARCHED and (piece := file.read(1 << 24)):
        block = tail + piece
        found = block.find(sign)
        while found >= 0:
            yield at - len(tail) + found
            found = block.find(sign, found + 1)
        at, tail = at + len(piece), block[1 - len(sign) :]
