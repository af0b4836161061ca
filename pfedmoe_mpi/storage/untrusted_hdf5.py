"""Checks of untrusted HDF5 files: which datasets and attributes are safe to use, before they are read.

A link can lead out of the file or in a circle. A dataset can lie in other files or be composed of them. A few
bytes can claim terabytes. Only datasets that are stored in the file itself, behind hard links, are used.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from pfedmoe_mpi.storage.untrusted_json import UnusableError

FROM_HDF5 = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, UnicodeError)
_HEAP, _OBJECT = struct.Struct("<Q"), struct.Struct("<H6xQ")  # length; number and length
_STALE = "already open for write"  # in HDF5's message about a file that its writer has not closed
_SEARCH_LIMIT = 2 << 30  # bytes of a file that are searched for heaps


def opening_remedy(error: BaseException, path: Path, otherwise: str) -> str:
    """Return the remedy for a file that HDF5 does not open: a writer holds or has left it, or `otherwise`."""
    number = error.errno if isinstance(error, OSError) else None
    if number in {errno.EAGAIN, errno.EACCES} and "lock" in str(error):
        return "close it in the program that writes it, such as a notebook, and run the command again"
    if _STALE in str(error):
        return f"close it in the program that writes it; if that program has ended: h5clear -s {path}"
    return otherwise


def find_dataset(file: Any, key: str) -> Any:
    """Return the dataset at `key`, stored in this file behind hard links; None if it is absent.

    Raises:
        UnusableError: a soft or external link, a virtual or external dataset, an object that is not a
            dataset, or a dataset without values.
    """
    group = file
    *parents, last = key.split("/")
    for number, name in enumerate([*parents, last]):
        raw = name.encode()
        if not group.id.links.exists(raw):
            return None
        if group.id.links.get_info(raw).type != h5py.h5l.TYPE_HARD:
            raise UnusableError(f"{key} is a link; it must be stored in this file")
        kind = group.get(name, getclass=True)
        if kind is not (h5py.Group if number < len(parents) else h5py.Dataset):
            raise UnusableError(f"{key} is not a dataset")
        group = group[name]
    plan = group.id.get_create_plist()
    if plan.get_layout() == h5py.h5d.VIRTUAL:
        raise UnusableError(f"{key} is a virtual dataset; its values must be stored in this file")
    if plan.get_layout() == h5py.h5d.CONTIGUOUS and plan.get_external_count():
        raise UnusableError(f"{key} is stored in external files; it must be stored in this file")
    if group.shape is None:
        raise UnusableError(f"{key} has no values")
    return group


def read_attribute(owner: Any, name: str, limit: int) -> Any:
    """Return an attribute that is a number, a text or an array of numbers; None if it is absent.

    Raises:
        UnusableError: an attribute of more than `limit` bytes, or of another type: references, compound
            types, variable-length lists.
    """
    if not h5py.h5a.exists(owner.id, name.encode()):
        return None
    handle = h5py.h5a.open(owner.id, name.encode())
    kind = handle.get_type()
    numbers = (h5py.h5t.TypeIntegerID, h5py.h5t.TypeFloatID, h5py.h5t.TypeEnumID)
    text = isinstance(kind, h5py.h5t.TypeStringID) and handle.shape == ()
    if handle.shape is None or not (text or isinstance(kind, numbers)):
        raise UnusableError(f"its attribute '{name}' is neither text nor numbers")
    if handle.get_storage_size() > limit:
        raise UnusableError(f"its attribute '{name}' is longer than {limit} bytes")
    value = owner.attrs[name]
    if text:
        what = f"its attribute '{name}'"
        value = check_utf8(value, what) if isinstance(value, str) else decode_utf8(bytes(value), what)
    return value


def decode_utf8(raw: bytes, what: str) -> str:
    """Decode UTF-8; raise UnusableError, about `what`, if the bytes are not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UnusableError(f"{what} is not UTF-8") from error


def check_utf8(text: str, what: str) -> str:
    """Return the text; raise UnusableError, about `what`, if it hides bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableError(f"{what} is not UTF-8") from error
    return text


def check_heaps(file: Any, path: Path) -> None:
    """Walk the heaps of variable-length texts as HDF5 will, which loops for ever at free space of length 0.

    Raises:
        OSError: an object is shorter than its own header, or longer than its heap.
    """
    if file.id.get_create_plist().get_sizes() != (8, 8):
        return
    with open(path, "rb") as raw:
        for start in _find_all(raw, b"GCOL\1\0\0\0"):
            at, end = start + 16, start + _HEAP.unpack(os.pread(raw.fileno(), 8, start + 8))[0]
            while at + _OBJECT.size <= end and len(head := os.pread(raw.fileno(), _OBJECT.size, at)) == 16:
                number, length = _OBJECT.unpack(head)
                # Number 0 is the free space, whose length includes the header.
                size = 16 + -(-length // 8) * 8 if number else length
                if not 16 <= size <= end - at:
                    raise OSError(f"its heap at byte {start} is damaged")
                at += size


def _find_all(file: Any, signature: bytes) -> Iterator[int]:
    """Yield the offsets of these bytes in the first `_SEARCH_LIMIT` bytes of a file."""
    at, tail = 0, b""
    while at < _SEARCH_LIMIT and (piece := file.read(1 << 24)):
        block = tail + piece
        index = block.find(signature)
        while index >= 0:
            yield at - len(tail) + index
            index = block.find(signature, index + 1)
        at, tail = at + len(piece), block[1 - len(signature) :]
