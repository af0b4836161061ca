"""`check`: what this cluster can do for a job: MPI, hosts, GPU, file system, signals, versions.

    mpirun -n 4 python -m pfedmoe_mpi check [FOLDER]

One line per finding, `ok` or `FAIL` with the remedy. FOLDER is where runs will be written; what is written
there is removed again.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from pfedmoe_mpi import environment
from pfedmoe_mpi.config.sections import Train
from pfedmoe_mpi.errors import EXIT_DONE, EXIT_FAULT, UserError
from pfedmoe_mpi.mpi import comm, device, session
from pfedmoe_mpi.mpi.comm import Comm

SUM_SIZES = (1, 1_000, 665_048, 4_000_000)  # int64 numbers; the third is pFedMoE's shared extractor
PIECE = 1 << 22  # bytes each rank writes
RENAMES = 100
OTHER_FOLDER = "use a folder on a file system that all hosts share, with the space and the right to write"


@dataclass(frozen=True)
class Finding:
    """One line."""

    ok: bool
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"ok   {self.text}" if self.ok else f"FAIL {self.text}; remedy: {self.remedy}"


def run(folder: Path) -> int:
    """Print the findings; 0 if all are ok, else 1."""
    return session.under_mpi(lambda world, code: _check(world, folder, code), singleton=True)


def _check(world: Comm, folder: Path, code: str) -> int:
    failed = False
    for finding in findings(world, folder, code):
        failed |= not finding.ok
        if environment.launched_rank() == 0 == world.rank:
            print(finding, flush=True)
    return EXIT_FAULT if failed else EXIT_DONE


def findings(world: Comm, folder: Path, code: str) -> Iterator[Finding]:
    """All checks, one after the other; collective, the same findings on every rank."""
    yield from _versions(world, code)
    yield _ranks(world)
    yield from _devices(world)
    yield _sum(world)
    yield _signals(world)
    yield from _files(world, folder)


def _told(world: Comm, work: Callable[[], object], purpose: str) -> str:
    """Do `work` on every rank; what went wrong, by rank, or nothing."""
    try:
        work()
        own = ""
    except (OSError, RuntimeError, ValueError) as error:
        own = str(error) or type(error).__name__
    told = world.gather(own, purpose)
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(told) if text)


# Programs and machines


def _versions(world: Comm, code: str) -> Iterator[Finding]:
    import torch

    from pfedmoe_mpi.storage import hdf5_check

    yield Finding(True, f"{comm.library()}, mpi4py {metadata.version('mpi4py')}")
    own = (
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"{hdf5_check.version_text()}"
    )
    found = world.gather(own, "versions")
    unlike = {text: found.index(text) for text in found}
    yield Finding(
        len(unlike) == 1,
        f"pfedmoe_mpi {world.gather(code, 'versions')[0]}, {own}"
        if len(unlike) == 1
        else "unlike versions: " + "; ".join(f"rank {rank}: {text}" for text, rank in unlike.items()),
        "start every rank from the same environment",
    )


def _ranks(world: Comm) -> Finding:
    launched = environment.launched_size(os.environ)
    if world.size == 1 and launched > 1:
        return Finding(
            False,
            f"the launcher started {launched} ranks, but each believes it is alone",
            "use the mpirun of the same MPI, or srun --mpi=pmi2 (MPICH) or pmix (Open MPI)",
        )
    hosts = Counter(world.gather(platform.node(), "hosts"))
    listed = ", ".join(f"{host}: {ranks}" for host, ranks in hosts.items())
    return Finding(True, f"{world.size} rank(s) on {len(hosts)} host(s) ({listed})")


def _devices(world: Comm) -> Iterator[Finding]:
    """One line per rank: host, local rank, GPU or cores and threads."""
    left = world.gather((environment.cores(), environment.CORES), "cores")
    shrunk = [rank for rank, (now, then) in enumerate(left) if now < then]
    if shrunk:
        text = f"importing torch left rank {shrunk[0]} {left[shrunk[0]][0]} of {left[shrunk[0]][1]} cores"
        yield Finding(False, text, "unset OMP_PROC_BIND")
    local, beside = world.local()
    try:
        chosen = device.choose(world, Train())
    except UserError as error:
        yield Finding(False, str(error).partition("\n")[0], "ask the job for GPUs on every host")
        return
    for rank, line in enumerate(world.gather(f"local rank {local} of {beside}, {chosen.line}", "devices")):
        yield Finding(True, f"rank {rank}: {line}")
    kinds = set(world.gather(chosen.device.type, "devices"))
    if len(kinds) > 1:
        yield Finding(False, "some ranks see a GPU, others none", "ask the job for GPUs on every host")
    crowded = world.gather(beside > environment.CORES and chosen.device.type == "cpu", "cores")
    if any(crowded):
        hosts = "there are more ranks than cores"
        yield Finding(True, f"{hosts} (rank {crowded.index(True)}): it works, no faster than one per core")


# MPI


def _sum(world: Comm) -> Finding:
    """Σ over ranks r of (r + 1)·a + r must be a·n(n+1)/2 + n(n−1)/2, to the last bit, for large random a."""
    ranks = world.size
    pairs = ranks * (ranks + 1) // 2
    seconds = 0.0
    for size in SUM_SIZES:
        base = np.random.default_rng(size).integers(-(2**61) // pairs, 2**61 // pairs, size)
        buffer = base * (world.rank + 1) + world.rank
        started = time.perf_counter()
        waited = world.sum(buffer, "sum")
        seconds = time.perf_counter() - started - waited
        wrong = (buffer != base * pairs + pairs - ranks).sum()
        if any(world.gather(int(wrong), "sum")):
            return Finding(
                False,
                f"the integer sum of {size:,} numbers over {ranks} rank(s) is wrong",
                "report it to whoever maintains this MPI; another MPI library or another transport may do",
            )
    speed = 8e-6 * SUM_SIZES[-1] / max(world.gather(seconds, "sum"))
    sizes = ", ".join(f"{size:,}" for size in SUM_SIZES)
    figure = f", {speed:.0f} MB/s" if ranks > 1 else ""
    return Finding(True, f"integer sum over {ranks} rank(s) exact for {sizes} numbers{figure}")


def _signals(world: Comm) -> Finding:
    """Whether a handler runs while this rank sleeps between two tests, as it does when it waits."""
    got = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda number, frame: got.set())
    try:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        deadline = time.monotonic() + 5
        while not got.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGUSR1, before)
    deaf = [rank for rank, heard in enumerate(world.gather(got.is_set(), "signals")) if not heard]
    if deaf:
        remedy = "do not start the job with SIGUSR1 blocked"
        return Finding(False, f"SIGUSR1 does not reach rank {', '.join(map(str, deaf))}", remedy)
    return Finding(True, f"SIGUSR1 is handled while waiting; {_launcher_signals()}")


def _launcher_signals() -> str:
    """How this MPI's launcher passes signals on."""
    library = comm.library()
    family = "whether mpirun passes it on is not known for this MPI"
    if "Open MPI" in library:
        family = "Open MPI's mpirun passes it on, SIGTERM ends the job at once"
    elif "MPICH" in library or "Intel" in library:
        family = "MPICH's mpirun passes on SIGUSR1, SIGTERM and Ctrl-C, SIGUSR2 kills it"
    return f"{family}; Slurm: --signal=B:USR1@120 and a trap that tells mpirun, under srun without B:"


# The file system


def _files(world: Comm, folder: Path) -> Iterator[Finding]:
    made, trouble = world.from_root(lambda: _make_folder(folder), "folder")
    if trouble:
        yield Finding(False, f"{folder}: {trouble}", OTHER_FOLDER)
        return
    path = Path(made)
    try:
        seen = world.gather(path.is_dir(), "folder")
        if not all(seen):
            text = f"rank {seen.index(False)} does not see {folder} as rank 0 does"
            yield Finding(False, text, OTHER_FOLDER)
            return
        yield _parallel_write(world, path / "pieces")
        yield _rename(world, path)
        yield _hard_links(world, path)
        yield _locking(world, path / "locking.h5")
    finally:
        if world.rank == 0:
            shutil.rmtree(path, ignore_errors=True)


def _make_folder(folder: Path) -> tuple[str, str]:
    """(a new folder in `folder`, ""), or ("", the reason why not)."""
    if not folder.is_dir():
        return "", "there is no such folder"
    try:
        return tempfile.mkdtemp(prefix=".pfedmoe-check-", dir=folder.absolute()), ""
    except OSError as error:
        return "", f"cannot write there ({error.strerror})"


def _parallel_write(world: Comm, path: Path) -> Finding:
    """Every rank writes its piece of one file, and reads its neighbour's."""

    def pattern(rank: int) -> bytes:
        return np.random.default_rng(rank).bytes(PIECE)

    def create() -> None:
        if world.rank == 0:
            path.touch()

    def write() -> None:
        with open(path, "r+b", buffering=0) as file:
            done = 0
            while done < PIECE:
                done += os.pwrite(file.fileno(), own[done:], world.rank * PIECE + done)
            os.fsync(file.fileno())

    def read() -> None:
        other = (world.rank + 1) % world.size
        with open(path, "rb", buffering=0) as file:
            if os.pread(file.fileno(), PIECE, other * PIECE) != pattern(other):
                raise ValueError(f"reads other bytes than rank {other} wrote")

    own = memoryview(pattern(world.rank))
    trouble = _told(world, create, "create")
    started = time.perf_counter()
    trouble = trouble or _told(world, write, "pwrite")
    seconds = time.perf_counter() - started
    trouble = trouble or _told(world, read, "read back")
    if trouble:
        return Finding(False, f"one file written by all ranks: {trouble}", OTHER_FOLDER)
    speed = 1e-6 * PIECE * world.size / seconds
    return Finding(True, f"one file written by {world.size} rank(s) with pwrite and fsync, {speed:.0f} MB/s")


def _rename(world: Comm, folder: Path) -> Finding:
    """Rank 0 replaces a file again and again; whoever reads it meets one of its versions, whole."""
    target, fresh = folder / "renamed", folder / "fresh"
    versions = {bytes([letter]) * 4096 for letter in b"ab"}

    def replace() -> None:
        for number in range(RENAMES):
            fresh.write_bytes(sorted(versions)[number % 2])
            os.replace(fresh, target)
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def watch() -> None:
        for _ in range(RENAMES):
            if target.read_bytes() not in versions:
                raise ValueError("saw a file that was not whole")

    first = _told(world, replace if world.rank == 0 else lambda: None, "rename")
    both = _told(world, replace if world.rank == 0 else watch, "rename")
    trouble = first or both or _told(world, watch, "rename")
    if trouble:
        return Finding(False, f"rename is not atomic here: {trouble}", OTHER_FOLDER)
    return Finding(True, f"rename is atomic ({RENAMES} times, watched by {world.size - 1} other rank(s))")


def _hard_links(world: Comm, folder: Path) -> Finding:
    def link() -> bool:
        try:
            os.link(folder / "renamed", folder / "linked")
        except OSError:
            return False
        return True

    if world.from_root(link, "hard link"):
        return Finding(True, "hard links work: best.h5 takes no space of its own")
    return Finding(True, "no hard links here: best.h5 is a copy, which works too")


def _locking(world: Comm, path: Path) -> Finding:
    """HDF5 with the locking this program asks for: one writes, then all read at once."""
    from pfedmoe_mpi.storage import hdf5_check

    trouble = _told(world, lambda: hdf5_check.write_numbers(path) if world.rank == 0 else None, "HDF5")
    trouble = trouble or _told(world, lambda: hdf5_check.read_numbers(path), "HDF5")
    if trouble:
        return Finding(False, f"HDF5: {trouble}", "HDF5_USE_FILE_LOCKING=BEST_EFFORT, or another file system")
    locks = all(world.gather(hdf5_check.locks_work(path), "HDF5"))
    return Finding(
        True, f"HDF5 writes and reads; its file locks {'work' if locks else 'do not, and are not needed'}"
    )
