"""`check`: whether this cluster can run a job: versions, hosts, GPUs, MPI, signals and the file system.

    mpirun -n 4 python -m pfedmoe_mpi check [FOLDER]

Every finding is one line: `ok`, or `FAIL` with a remedy. FOLDER is where runs will be written; the check
removes the files that it writes there.
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

SUM_SIZES = (1, 1_000, 665_048, 4_000_000)  # int64 numbers; pFedMoE's shared extractor has 665,048
PIECE = 1 << 22  # bytes that each rank writes
RENAMES = 100
OTHER_FOLDER = "use a writable folder with free space on a file system that all hosts share"


@dataclass(frozen=True)
class Finding:
    """The result of one check, printed as one line."""

    ok: bool
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"ok   {self.text}" if self.ok else f"FAIL {self.text}; remedy: {self.remedy}"


def run(folder: Path) -> int:
    """Print the findings, and return exit code 0 if all are ok, else 1."""
    given = {"command": "check"}
    return session.under_mpi(lambda world, code: _check(world, folder, code), given, singleton=True)


def _check(world: Comm, folder: Path, code: str) -> int:
    failed = False
    for finding in findings(world, folder, code):
        failed |= not finding.ok
        if environment.launched_rank() == 0 == world.rank:
            print(finding, flush=True)
    return EXIT_FAULT if failed else EXIT_DONE


def findings(world: Comm, folder: Path, code: str) -> Iterator[Finding]:
    """Yield the finding of every check, the same on every rank; collective."""
    yield from _versions(world, code)
    yield _ranks(world)
    yield from _devices(world)
    yield _sum(world)
    yield _signals(world)
    yield from _files(world, folder)


def _errors_of(world: Comm, work: Callable[[], object], purpose: str) -> str:
    """Do `work` on every rank, and return the error messages by rank, or ""; collective."""
    try:
        work()
        message = ""
    except (OSError, RuntimeError, ValueError) as error:
        message = str(error) or type(error).__name__
    messages = world.gather(message, purpose)
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(messages) if text)


# Software and hosts


def _versions(world: Comm, code: str) -> Iterator[Finding]:
    import torch

    from pfedmoe_mpi.storage import hdf5_check

    yield Finding(True, f"{comm.library()}, mpi4py {metadata.version('mpi4py')}")
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"{hdf5_check.version_text()}"
    )
    of_ranks = world.gather(versions, "versions")
    first_rank = {text: of_ranks.index(text) for text in of_ranks}
    yield Finding(
        len(first_rank) == 1,
        f"pfedmoe_mpi {world.gather(code, 'versions')[0]}, {versions}"
        if len(first_rank) == 1
        else "versions differ: " + "; ".join(f"rank {rank}: {text}" for text, rank in first_rank.items()),
        "start every rank from the same environment",
    )


def _ranks(world: Comm) -> Finding:
    launched = environment.launched_size(os.environ)
    if world.size == 1 and launched > 1:
        return Finding(
            False,
            f"the launcher started {launched} ranks, but each believes it is alone",
            "use the mpirun of the MPI library that mpi4py uses, or srun --mpi=pmi2 (MPICH), srun --mpi=pmix "
            "(Open MPI)",
        )
    hosts = Counter(world.gather(platform.node(), "hosts"))
    ranks_by_host = ", ".join(f"{host}: {ranks}" for host, ranks in hosts.items())
    return Finding(True, f"{world.size} rank(s) on {len(hosts)} host(s) ({ranks_by_host})")


def _devices(world: Comm) -> Iterator[Finding]:
    """Yield one finding per rank: host, local rank, GPU or cores and threads."""
    cores = world.gather((environment.cores(), environment.CORES), "cores")
    shrunk = [rank for rank, (now, at_start) in enumerate(cores) if now < at_start]
    if shrunk:
        now, at_start = cores[shrunk[0]]
        text = f"importing torch reduced the cores of rank {shrunk[0]} from {at_start} to {now}"
        yield Finding(False, text, "unset OMP_PROC_BIND")
    local, ranks_on_host = world.local()
    try:
        chosen = device.choose(world, Train())
    except UserError as error:
        yield Finding(False, error.problem, "request GPUs on every host of the job")
        return
    line = f"local rank {local} of {ranks_on_host}, {chosen.line}"
    for rank, text in enumerate(world.gather(line, "devices")):
        yield Finding(True, f"rank {rank}: {text}")
    kinds = set(world.gather(chosen.device.type, "devices"))
    if len(kinds) > 1:
        yield Finding(False, "some ranks see a GPU, others do not", "request GPUs on every host of the job")
    crowded = world.gather(ranks_on_host > environment.CORES and chosen.device.type == "cpu", "cores")
    if any(crowded):
        yield Finding(
            True,
            f"the host of rank {crowded.index(True)} has more ranks than cores; this works, but not faster "
            "than one rank per core",
        )


# MPI


def _sum(world: Comm) -> Finding:
    """Check the integer sum bit by bit.

    The sum over ranks r of (r + 1)·a + r must be a·n(n+1)/2 + n(n−1)/2 for large random a.
    """
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
                "use another MPI library or another transport, and report the error to the site's support",
            )
    speed = 8e-6 * SUM_SIZES[-1] / max(world.gather(seconds, "sum"))
    sizes = ", ".join(f"{size:,}" for size in SUM_SIZES)
    figure = f", {speed:.0f} MB/s" if ranks > 1 else ""
    return Finding(True, f"integer sum over {ranks} rank(s) exact for {sizes} numbers{figure}")


def _signals(world: Comm) -> Finding:
    """Check that a signal handler runs while this rank sleeps between two polls, as it does when it waits."""
    received = threading.Event()
    previous_handler = signal.signal(signal.SIGUSR1, lambda number, frame: received.set())
    try:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        deadline = time.monotonic() + 5
        while not received.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGUSR1, previous_handler)
    unreached = [
        rank for rank, handled in enumerate(world.gather(received.is_set(), "signals")) if not handled
    ]
    if unreached:
        remedy = "do not start the job with SIGUSR1 blocked"
        return Finding(False, f"SIGUSR1 does not reach rank {', '.join(map(str, unreached))}", remedy)
    return Finding(True, f"SIGUSR1 is handled while waiting; {_launcher_signals()}")


def _launcher_signals() -> str:
    """Return how this MPI's launcher forwards signals."""
    library = comm.library()
    forwarding = "it is unknown whether this MPI's mpirun forwards it"
    if "Open MPI" in library:
        forwarding = "Open MPI's mpirun forwards it, but SIGTERM ends the job at once"
    elif "MPICH" in library or "Intel" in library:
        forwarding = "MPICH's mpirun forwards SIGUSR1, SIGTERM and Ctrl-C, but SIGUSR2 kills it"
    return (
        f"{forwarding}; in Slurm use --signal=B:USR1@120 and a trap that signals mpirun, or with srun "
        "--signal=USR1@120"
    )


# The file system


def _files(world: Comm, folder: Path) -> Iterator[Finding]:
    name, error = world.from_root(lambda: _make_folder(folder), "folder")
    if error:
        yield Finding(False, f"{folder}: {error}", OTHER_FOLDER)
        return
    path = Path(name)
    try:
        visible = world.gather(path.is_dir(), "folder")
        if not all(visible):
            text = f"rank {visible.index(False)} does not see the folder that rank 0 made in {folder}"
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
    """Return (the name of a new folder in `folder`, ""), or ("", the error)."""
    if not folder.is_dir():
        return "", "there is no such folder"
    try:
        return tempfile.mkdtemp(prefix=".pfedmoe-check-", dir=folder.absolute()), ""
    except OSError as error:
        return "", f"no file can be written there ({error.strerror})"


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
    errors = _errors_of(world, create, "create")
    started = time.perf_counter()
    errors = errors or _errors_of(world, write, "pwrite")
    seconds = time.perf_counter() - started
    errors = errors or _errors_of(world, read, "read back")
    if errors:
        return Finding(False, f"one file written by all ranks: {errors}", OTHER_FOLDER)
    speed = 1e-6 * PIECE * world.size / seconds
    return Finding(True, f"one file written by {world.size} rank(s) with pwrite and fsync, {speed:.0f} MB/s")


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

    alone = _errors_of(world, replace if world.rank == 0 else lambda: None, "rename")
    watched = _errors_of(world, replace if world.rank == 0 else watch, "rename")
    errors = alone or watched or _errors_of(world, watch, "rename")
    if errors:
        return Finding(False, f"rename is not atomic: {errors}", OTHER_FOLDER)
    return Finding(True, f"rename is atomic ({RENAMES} times, watched by {world.size - 1} other rank(s))")


def _hard_links(world: Comm, folder: Path) -> Finding:
    """Report whether hard links work; a run works without them."""

    def link() -> bool:
        try:
            os.link(folder / "renamed", folder / "linked")
        except OSError:
            return False
        return True

    if world.from_root(link, "hard link"):
        return Finding(True, "hard links work: best.h5 needs no extra space")
    return Finding(True, "hard links do not work: best.h5 will be a copy, which is fine")


def _locking(world: Comm, path: Path) -> Finding:
    """Check HDF5 with the locking that this program uses: one rank writes, then all read at once."""
    from pfedmoe_mpi.storage import hdf5_check

    errors = _errors_of(world, lambda: hdf5_check.write_numbers(path) if world.rank == 0 else None, "HDF5")
    errors = errors or _errors_of(world, lambda: hdf5_check.read_numbers(path), "HDF5")
    if errors:
        remedy = "export HDF5_USE_FILE_LOCKING=BEST_EFFORT, or use another file system"
        return Finding(False, f"HDF5: {errors}", remedy)
    locks = all(world.gather(hdf5_check.locks_work(path), "HDF5"))
    return Finding(
        True,
        f"HDF5 writes and reads; its file locks {'work' if locks else 'do not work, but are not needed'}",
    )
