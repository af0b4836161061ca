"""`check`: whether this cluster can run a job: versions, hosts, GPUs, MPI, signals and the file system.

    mpirun -n 4 python -m pfedmoe_mpi check [FOLDER]

Every finding is one line: `ok`, `note` with advice, or `FAIL` with a remedy, and what was tried and came out.
FOLDER is where runs will be written; the check removes the files that it writes there.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np

from pfedmoe_mpi import environment
from pfedmoe_mpi.commands import check_folder
from pfedmoe_mpi.commands.finding import Finding, count_text
from pfedmoe_mpi.config.sections import Train
from pfedmoe_mpi.errors import EXIT_DONE, EXIT_FAULT, UserError
from pfedmoe_mpi.mpi import device, launch, session
from pfedmoe_mpi.mpi.comm import Comm

SUM_SIZES = (1, 1_000, 665_048, 4_000_000)  # int64 numbers; pFedMoE's shared extractor has 665,048


def run(folder: Path) -> int:
    """Print the findings, and return exit code 0 if all are ok, else 1."""
    given = {"command": "check"}
    return session.under_mpi(lambda world, code: _check(world, folder, code), given, singleton=True)


def _check(world: Comm, folder: Path, code: str) -> int:
    failed = 0
    shown = environment.launched_rank() == 0 == world.rank
    for finding in findings(world, folder, code):
        failed += not finding.ok
        if shown:
            print(finding, flush=True)
    if shown:
        print(f"{count_text(failed, 'check')} failed" if failed else "all checks passed", flush=True)
    return EXIT_FAULT if failed else EXIT_DONE


def findings(world: Comm, folder: Path, code: str) -> Iterator[Finding]:
    """Yield the finding of every check, the same on every rank; collective."""
    yield from _versions(world, code)
    yield _ranks(world)
    yield from _devices(world)
    yield _sum(world)
    yield _signals(world)
    yield _stopping()
    yield from _slurm(world)
    yield from check_folder.findings(world, folder)


# Software and hosts


def _versions(world: Comm, code: str) -> Iterator[Finding]:
    import torch

    from pfedmoe_mpi.storage import hdf5_check

    library = " ".join(launch.library().split())
    yield Finding(True, f"MPI library: {library}, used through mpi4py {metadata.version('mpi4py')}")
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"{hdf5_check.version_text()}"
    )
    of_ranks = world.gather(versions, "versions")
    first_rank = {text: of_ranks.index(text) for text in of_ranks}
    if len(first_rank) > 1:
        listed = "; ".join(f"rank {rank}: {text}" for text, rank in first_rank.items())
        text = f"software: the versions differ: {listed}"
        yield Finding(False, text, "start every rank from the same environment")
    else:
        version = world.gather(code, "versions")[0]
        yield Finding(True, f"software, equal on all ranks: pfedmoe_mpi {version}, {versions}")


def _ranks(world: Comm) -> Finding:
    launched = environment.launched_size(os.environ)
    if world.size == 1 and launched > 1:
        return Finding(
            False,
            f"ranks: the launcher started {launched} ranks, but each believes it is alone",
            "use the mpirun of the MPI library named above, or srun with --mpi=pmi2 (MPICH) or --mpi=pmix "
            "(Open MPI)",
        )
    hosts = Counter(world.gather(platform.node(), "hosts"))
    ranks_by_host = ", ".join(f"{host}: {ranks}" for host, ranks in hosts.items())
    return Finding(
        True, f"ranks: {count_text(world.size, 'rank')} on {count_text(len(hosts), 'host')} ({ranks_by_host})"
    )


def _devices(world: Comm) -> Iterator[Finding]:
    """Yield one finding per rank: host, local rank, GPU or cores and threads."""
    cores = world.gather((environment.cores(), environment.CORES), "cores")
    shrunk = [rank for rank, (now, at_start) in enumerate(cores) if now < at_start]
    if shrunk:
        now, at_start = cores[shrunk[0]]
        text = f"cores: importing torch reduced those of rank {shrunk[0]} from {at_start} to {now}"
        yield Finding(False, text, "remove OMP_PROC_BIND from the job's environment: unset OMP_PROC_BIND")
    local, ranks_on_host = world.local()
    try:
        chosen = device.choose(world, Train())
    except UserError as error:
        yield Finding(False, f"devices: {error.problem}", "request GPUs on every host of the job")
        return
    line = f"local rank {local} of {ranks_on_host}, trains on {chosen.line}"
    for rank, text in enumerate(world.gather(line, "devices")):
        yield Finding(True, f"rank {rank}: {text}")
    kinds = set(world.gather(chosen.device.type, "devices"))
    if len(kinds) > 1:
        without = world.gather(chosen.device.type, "devices").index("cpu")
        text = f"devices: rank {without} sees no GPU, and other ranks do"
        yield Finding(False, text, "request GPUs on every host of the job (Slurm: --gpus-per-node)")
    crowded = world.gather(ranks_on_host > environment.CORES and chosen.device.type == "cpu", "cores")
    if any(crowded):
        yield Finding(
            True,
            f"cores: the host of rank {crowded.index(True)} has more ranks than cores",
            "this works, but one rank per core is as fast: start fewer ranks, or request more cores",
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
                f"MPI sum: {size:,} int64 numbers were added over {count_text(ranks, 'rank')}, with a wrong "
                "result",
                "use another MPI library or another transport, and report the error to the site's support",
            )
    speed = 8e-6 * SUM_SIZES[-1] / max(world.gather(seconds, "sum"))
    figure = f", at {speed:.0f} MB/s" if ranks > 1 else ""
    tried = f"{SUM_SIZES[0]} to {SUM_SIZES[-1]:,} int64 numbers were added over {count_text(ranks, 'rank')}"
    return Finding(True, f"MPI sum: {tried}{figure}, and all results are exact")


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
        ranks = ", ".join(map(str, unreached))
        text = f"signals: each rank sent itself SIGUSR1, and rank {ranks} did not receive it"
        return Finding(False, text, "start the job from a shell or a service that does not block SIGUSR1")
    return Finding(
        True,
        "signals: each rank sent itself SIGUSR1 and received it while it waited; a run then stops with a "
        "checkpoint",
    )


def _stopping() -> Finding:
    """Return how this MPI's launcher treats signals; that is known, not tried."""
    library = launch.library()
    if "Open MPI" in library:
        return Finding(
            True,
            "stopping a run: Open MPI's mpirun passes SIGUSR1 to the ranks, but SIGTERM ends the job at once",
            "stop a run with `kill -USR1 PID`, where PID is the process id of mpirun",
        )
    if "MPICH" in library or "Intel" in library:
        return Finding(
            True,
            "stopping a run: MPICH's mpirun passes SIGUSR1, SIGTERM and Ctrl-C to the ranks; SIGUSR2 ends "
            "it at once",
            "stop a run with `kill -USR1 PID`, where PID is the process id of mpirun",
        )
    return Finding(
        True,
        "stopping a run: it is unknown whether this MPI's mpirun passes SIGUSR1 on to the ranks",
        "try `kill -USR1 PID` on the mpirun of a short run; with exit code 75 it stopped with a checkpoint",
    )


def _slurm(world: Comm) -> Iterator[Finding]:
    """Yield how a Slurm job warns the run before its time limit, where there is a Slurm."""
    if not world.from_root(lambda: bool(os.environ.get("SLURM_JOB_ID") or shutil.which("sbatch")), "slurm"):
        return
    yield Finding(
        True,
        "Slurm: it can send SIGUSR1 two minutes before a job's time limit. In a script that starts mpirun, "
        "`#SBATCH --signal=B:USR1@120` signals the script, and a trap there must signal mpirun; in one that "
        "starts srun, `#SBATCH --signal=USR1@120` (without `B:`) signals the ranks",
        "submit jobs/train.slurm or another script of jobs/, where this is done for both",
    )
