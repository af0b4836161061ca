"""A run that is stopped in mid-round and restarted on another rank count, and the same run undisturbed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.bench import jobs
from pfedmoe_mpi.bench.progress import announce
from pfedmoe_mpi.bench.start import launcher
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.commands import inspect
from pfedmoe_mpi.errors import EXIT_DONE, EXIT_STOPPED, RunError
from pfedmoe_mpi.storage import untrusted_json

LIMIT = 7200.0  # seconds for one job
MEASURED = 0.01  # of the clients, after the last round


def compare(place: Path, ranks: int, settings: Mapping[str, Any], stop: int, most: float) -> Iterator[str]:
    """Run, stop within a round after the first `stop`, restart, and yield lines on what came out.

    Args:
        place: a folder for both runs.
        most: bytes of a rank that are allowed.

    Raises:
        LaunchError: a job fails.
        RunError: the restarted run ends with other bits, or no stop came after the first member of a round.
    """
    rounds = {"eval.every": settings["rounds"], "eval.clients": MEASURED, "run.checkpoint_every": stop // 2}
    flags = [f"--{name}={value}" for name, value in {**settings, **rounds}.items()]
    program = ["-m", "pfedmoe_mpi"]
    announce(f"restart: {settings['clients']:,} clients, undisturbed on {ranks} rank(s)")
    whole, broken = place / "undisturbed", place / "stopped"
    started = time.perf_counter()
    jobs.run([*launcher(ranks), *program, *flags, f"--run.dir={whole}"], LIMIT)
    yield f"restart   {settings['rounds']} rounds of {settings['clients']:,} clients on {ranks} rank(s): " + (
        f"{time.perf_counter() - started:.0f} s"
    )
    newest = _stopped([*launcher(ranks), *program], flags, broken, stop, settings["rounds"])
    other = 1 if ranks > 1 else 2
    announce(f"restart: on {other} rank(s)")
    jobs.run([*launcher(other), *program, "restart", str(broken)], LIMIT)
    digests = [_digest(run / "checkpoints") for run in (whole, broken)]
    found = f"restart   stopped with {newest}, restarted on {other} rank(s)"
    if digests[0] != digests[1]:
        problem = f"{found}: digest {digests[1]}, undisturbed {digests[0]}"
        raise RunError(problem, "`verify RUN_DIR` on a run of these settings names the vectors that differ")
    yield f"{found}: the undisturbed digest {digests[1][:16]}…"
    rows = [row for run in (whole, broken) for row in untrusted_json.read_lines(run / "metrics.jsonl")]
    memory = max(row["rss_mb"] for row in rows) * 2**20
    verdict = "met" if memory <= most else "missed"
    yield f"restart   memory of the largest rank {memory / 2**30:.2f} GB, ≤ {most / 2**30:g} GB {verdict}"


def _stopped(program: Sequence[str], flags: Sequence[str], folder: Path, stop: int, rounds: int) -> str:
    """Run until a stop leaves a round in progress with a member that has finished; return its checkpoint.

    The first stop is in the round after `stop`. One that comes too early or too late is tried again later.
    """
    command = [*program, *flags, f"--run.dir={folder}"]
    while stop < rounds:
        announce(f"restart: stopped in round {stop + 1}")
        jobs.run(command, LIMIT, _stopper(stop), (EXIT_DONE, EXIT_STOPPED))
        with Checkpoint(checkpoint.newest_first(folder / "checkpoints")[0]) as loaded:
            if loaded.finished:
                return loaded.path.name
            stop = loaded.round + 2  # from one round to the next the stopper learns how long they are
        command = [*program, "restart", str(folder)]
    problem = "no stop came within a round after its first member had finished"
    raise RunError(problem, "repeat it when fewer other processes use the machine: bench scale restart")


def _stopper(stop: int) -> Any:
    """Return a reader of a job's output that stops it when two thirds of the round after `stop` are over.

    By then a rank that trains two members has finished one.
    """
    times: list[float] = []

    def read(process: jobs.Process, line: str) -> None:
        if not line.startswith("round ") or "rank 0:" in line:  # of a round in progress
            return
        times.append(time.perf_counter())
        if line.startswith(f"round {stop}/"):
            time.sleep(median(after - before for before, after in pairwise(times)) * 2 / 3)
            process.send_signal(signal.SIGUSR1)

    return read


def _digest(folder: Path) -> str:
    with Checkpoint(checkpoint.newest_first(folder)[0]) as loaded:
        return inspect.digest(loaded)
