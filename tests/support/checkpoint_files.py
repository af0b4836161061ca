"""Small checkpoints: written by one rank, taken apart, and edited with a valid seal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.checkpoint import Content, seal
from pfedmoe_mpi.federation.written import Vectors
from pfedmoe_mpi.mpi.comm import Comm
from support.checkpoint_checks import distribute, sample_content, sample_row


@cache
def single_rank() -> Comm:
    """Return a communicator of one rank."""
    from mpi4py import MPI

    return Comm(MPI.COMM_SELF)


def write_alone(path: Path, whole: Content) -> Path:
    home, mine = distribute(single_rank(), whole)
    checkpoint.write(single_rank(), path, whole, mine.__getitem__, home)
    return path


def write_leaning(folder: Path) -> Path:
    """Write two checkpoints, and return the second one, which relies on the first for most vectors."""
    whole = sample_content(sizes=(5000, 3000), state=10)
    known = Vectors(np.array([4 * layout.size for layout in whole.client_layouts]))
    for round, changed in ((3, range(12)), (4, (1, 6))):
        now = replace(whole, round=round, history=[sample_row(n + 1) for n in range(round)])
        path, (home, mine) = folder / checkpoint.name(round, False), distribute(single_rank(), now)
        known.change(changed)
        divide = partial(known.divided, path)
        known.written(checkpoint.write(single_rank(), path, now, mine.__getitem__, home, divide=divide))
    assert checkpoint.files_needed(path) == {checkpoint.name(3, False)}
    return path


def read_ranges(path: Path) -> tuple[dict[str, tuple[int, int]], int]:
    """Return {dataset: (offset, length)} as the seal lists them, and the user block's length."""
    with open(path, "rb") as file:
        found = seal.read(file, path)
    return {one.name: (one.offset, one.length) for one in found.ranges}, found.start


def regions(path: Path) -> dict[str, tuple[int, int]]:
    """Return {region: (first byte, last byte)} of a whole checkpoint."""
    ranges, start = read_ranges(path)
    table = 32 + 48 * len(ranges)
    names = table + len("\n".join(ranges))
    named = {
        "magic": (0, 7),
        "version": (8, 11),
        "entries": (12, 15),
        "length of the names": (16, 23),
        "length": (24, 31),
        "table": (32, table - 1),
        "names": (table, names - 1),
        "digest of the rest": (names, names + 31),
        "padding of the user block": (names + 32, start - 33),
        "digest of the user block": (start - 32, start - 1),
        "superblock": (start, start + 47),
    }
    at = start
    for name, (offset, size) in [*ranges.items(), ("end", (path.stat().st_size, 0))]:
        if offset > at:
            named[f"structure before {name}"] = (at, offset - 1)
        if size:
            named[name] = (offset, offset + size - 1)
        at = offset + size
    return named


def reseal(path: Path, edit: Callable[[Any], object]) -> Path:
    """Edit a checkpoint and compute a valid seal for it, as an attacker could."""
    with h5py.File(path, "r+") as file:
        edit(file)
    table: dict[str, tuple[int, int]] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            plan = item.id.get_create_plist()
            inside = plan.get_layout() == h5py.h5d.CONTIGUOUS and not plan.get_external_count()
            if inside and item.id.get_storage_size() and item.id.get_offset() is not None:
                table[name] = (item.id.get_offset(), item.id.get_storage_size())

    with h5py.File(path, "r") as file:
        file.visititems(note)
    end = path.stat().st_size
    table = {name: (offset, size) for name, (offset, size) in table.items() if offset + size <= end}
    with open(path, "r+b") as raw:
        seal.put(raw, table, {})
    return path
