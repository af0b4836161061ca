"""The part of `check` that tries the folder of the runs: writing together, renaming, links and HDF5."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pfedmoe_mpi.commands.finding import Finding, count_text, errors_of
from pfedmoe_mpi.federation.disk import in_units
from pfedmoe_mpi.mpi.comm import Comm

PIECE = 1 << 22  # bytes that each rank writes
RENAMES = 100
OTHER_FOLDER = "use a writable folder with free space on a file system that all hosts share: check FOLDER"


def findings(world: Comm, folder: Path) -> Iterator[Finding]:
    """Yield the findings about `folder`, the same on every rank; collective."""
    folder = world.from_root(folder.absolute, "folder")
    name, error, remedy = world.from_root(lambda: _make_folder(folder), "folder")
    if error:
        yield Finding(False, f"folder: {folder} {error}", remedy)
        return
    path = Path(name)
    try:
        visible = world.gather(path.is_dir(), "folder")
        if not all(visible):
            text = f"folder: rank {visible.index(False)} does not see the folder that rank 0 made in {folder}"
            yield Finding(False, text, OTHER_FOLDER)
            return
        free = in_units(world.from_root(lambda: shutil.disk_usage(path).free, "free space"))
        yield Finding(True, f"folder: {folder} is seen by all ranks, {free} free")
        yield _parallel_write(world, path / "pieces")
        yield _rename(world, path)
        yield _hard_links(world, path)
        yield _locking(world, path / "locking.h5")
    finally:
        if world.rank == 0:
            shutil.rmtree(path, ignore_errors=True)


def _make_folder(folder: Path) -> tuple[str, str, str]:
    """Return (the name of a new folder in `folder`, "", ""), or ("", the error, its remedy)."""
    try:
        if folder.exists() and not folder.is_dir():
            return "", "is not a folder", "name the folder where runs will be written: check FOLDER"
        if not folder.is_dir():
            remedy = f"mkdir -p {folder}, or name another: check FOLDER"
            return "", "does not exist on the host of rank 0", remedy
        return tempfile.mkdtemp(prefix=".pfedmoe-check-", dir=folder), "", ""
    except OSError as error:
        return "", f"cannot be written to ({error.strerror})", OTHER_FOLDER


def _parallel_write(world: Comm, path: Path) -> Finding:
    """Check that all ranks can write pieces of one file, and read their neighbour's piece."""

    def pattern(rank: int) -> bytes:
        return np.random.default_rng(rank).bytes(PIECE)

    def create() -> None:
        if world.rank == 0:
            path.touch()

    def write() -> None:
        with open(path, "r+b", buffering=0) as file:
            written = 0
            while written < PIECE:
                written += os.pwrite(file.fileno(), piece[written:], world.rank * PIECE + written)
            os.fsync(file.fileno())

    def read() -> None:
        other = (world.rank + 1) % world.size
        with open(path, "rb", buffering=0) as file:
            if os.pread(file.fileno(), PIECE, other * PIECE) != pattern(other):
                raise ValueError(f"did not read the bytes that rank {other} wrote")

    piece = memoryview(pattern(world.rank))
    errors = errors_of(world, create, "create")
    started = time.perf_counter()
    errors = errors or errors_of(world, write, "pwrite")
    seconds = time.perf_counter() - started
    errors = errors or errors_of(world, read, "read back")
    if errors:
        text = f"parallel writing: the ranks wrote parts of one file (pwrite, fsync), and failed: {errors}"
        return Finding(False, text, OTHER_FOLDER)
    speed = 1e-6 * PIECE * world.size / seconds
    return Finding(
        True,
        f"parallel writing: {count_text(world.size, 'rank')} wrote 4 MiB each into one file (pwrite, fsync) "
        f"at {speed:.0f} MB/s, and read back what another one wrote",
    )


def _rename(world: Comm, folder: Path) -> Finding:
    """Check that ranks that read a file, while rank 0 replaces it repeatedly, always see a whole version."""
    target, replacement = folder / "renamed", folder / "fresh"
    versions = {bytes([letter]) * 4096 for letter in b"ab"}

    def replace() -> None:
        for number in range(RENAMES):
            replacement.write_bytes(sorted(versions)[number % 2])
            os.replace(replacement, target)
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def watch() -> None:
        for _ in range(RENAMES):
            if target.read_bytes() not in versions:
                raise ValueError("read an incomplete file")

    alone = errors_of(world, replace if world.rank == 0 else lambda: None, "rename")
    watched = errors_of(world, replace if world.rank == 0 else watch, "rename")
    errors = alone or watched or errors_of(world, watch, "rename")
    if errors:
        return Finding(False, f"rename: a file was replaced, and failed: {errors}", OTHER_FOLDER)
    readers = f"while {count_text(world.size - 1, 'other rank')} read it" if world.size > 1 else "by one rank"
    text = f"rename: a file was replaced {RENAMES} times {readers}, and every read saw a whole version"
    return Finding(True, text)


def _hard_links(world: Comm, folder: Path) -> Finding:
    """Report whether hard links work; a run works without them."""

    def link() -> bool:
        try:
            os.link(folder / "renamed", folder / "linked")
        except OSError:
            return False
        return True

    if world.from_root(link, "hard link"):
        return Finding(True, "hard links: a file got a second name, so best.h5 is one and needs little space")
    text = "hard links: a file cannot get a second name here, so best.h5 is a copy"
    return Finding(True, text, "reckon with the space of one more checkpoint per run")


def _locking(world: Comm, path: Path) -> Finding:
    """Check HDF5 with the locking that this program uses: one rank writes, then all read at once."""
    from pfedmoe_mpi.storage import hdf5_check

    errors = errors_of(world, lambda: hdf5_check.write_numbers(path) if world.rank == 0 else None, "HDF5")
    errors = errors or errors_of(world, lambda: hdf5_check.read_numbers(path), "HDF5")
    if errors:
        text = f"HDF5: rank 0 wrote a file and all ranks read it, and failed: {errors}"
        return Finding(False, text, "export HDF5_USE_FILE_LOCKING=BEST_EFFORT, or use another file system")
    text = "HDF5: rank 0 wrote a file, and all ranks read it at once"
    if all(world.gather(hdf5_check.locks_work(path), "HDF5")):
        return Finding(True, f"{text}; file locks work")
    return Finding(
        True,
        f"{text}; file locks do not work",
        "this program needs none; for others, export HDF5_USE_FILE_LOCKING=FALSE",
    )
