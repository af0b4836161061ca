"""`bench start`: the time until a job starts round 1, compared with the same ranks importing torch only.

Runs without a launcher and starts one itself, because a process must not start others once MPI runs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pfedmoe_mpi import environment
from pfedmoe_mpi.bench import timing
from pfedmoe_mpi.bench.progress import Stage, announce
from pfedmoe_mpi.errors import EXIT_DONE, ConfigError, LaunchError
from pfedmoe_mpi.mpi import device

RANKS = 16  # as in the README's first command
REPEATS, QUICK_REPEATS = 3, 1
LIMIT = 600.0  # seconds for one start
IMPORT = "import torch; print('imported', flush=True)"


def run(words: Sequence[str], flags: Mapping[str, Any], quick: bool = False) -> int:
    """Measure and print the table; `words` may contain the number of ranks.

    Raises:
        ConfigError: there are other words, or more than one.
        LaunchError: this runs under a launcher, there is no launcher, or the job fails.
    """
    if len(words) > 1 or not all(word.isdecimal() and int(word) for word in words):
        problem = f"bench start takes a number of ranks, not {' '.join(words)}"
        raise ConfigError(problem, "pfedmoe-mpi bench start 16")
    if environment.launched_size(os.environ) > 1:
        raise LaunchError(
            "bench start launches ranks itself", "run it without mpirun: pfedmoe-mpi bench start 16"
        )
    ranks = int(words[0]) if words else RANKS
    command = launcher(ranks)
    with tempfile.TemporaryDirectory(prefix="pfedmoe-bench-") as folder:
        number = 0

        def ours() -> float:
            nonlocal number
            number += 1
            settings = [
                f"--{name}={','.join(value) if isinstance(value, list) else value}"
                for name, value in flags.items()
                if name not in {"rounds", "run.dir"}
            ]
            fixed = ["--rounds=1", f"--run.dir={folder}/{number}"]
            return _seconds_until([*command, "-m", "pfedmoe_mpi", *settings, *fixed], "run folder ", 1)

        def reference() -> float:
            return _seconds_until([*command, "-c", IMPORT], "imported", ranks)

        print(f"{device.processor()}: {environment.CORES} cores, {time.strftime('%Y-%m-%d %H:%M %z')}")
        print(timing.HEADING, flush=True)
        repeats = QUICK_REPEATS if quick else REPEATS
        announce(f"start: one start of {ranks} ranks importing torch, to see how long it takes")
        stage = Stage("start", 2 * (1 + repeats) * reference())
        pair = timing.side_by_side(ours, reference, repeats, stage.pair_done)
    print(pair.line(f"start of {ranks} ranks to round 1 vs importing torch", 1.2).text(), flush=True)
    return EXIT_DONE


def launcher(ranks: int) -> list[str]:
    """Return the command that starts Python on `ranks` ranks of this host, even on more than it has cores."""
    beside_python = str(Path(sys.executable).parent / "mpirun")
    launcher = shutil.which("mpirun") or shutil.which("mpiexec") or shutil.which(beside_python)
    if not launcher:
        remedy = "load the cluster's MPI module, or pip install 'pfedmoe_mpi[mpich]'"
        raise LaunchError("mpirun is not installed", remedy)
    version = subprocess.run(
        [launcher, "--version"],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        timeout=60,
    ).stdout
    options = ["--oversubscribe"] if "Open MPI" in version or "OpenRTE" in version else []
    return [launcher, "-n", str(ranks), *options, sys.executable]


def paths() -> str:
    """Return the PYTHONPATH with which started ranks import this package."""
    return os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])


def _seconds_until(command: Sequence[str], word: str, times: int) -> float:
    """Run a command to its end; return the seconds until its output has `word` for the `times`-th time."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONPATH": paths()},
            start_new_session=True,
        )
        try:
            seconds = _read_until(process, word, times, started)
            process.communicate(timeout=LIMIT)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if seconds is None or process.returncode:
            errors.seek(0)
            tail = errors.read()[-2000:].strip()
            raise LaunchError(
                f"`{' '.join(command)}` failed with code {process.returncode}:\n{tail}",
                "run this command alone to find its fault",
            )
    return seconds


def _read_until(process: subprocess.Popen[str], word: str, times: int, started: float) -> float | None:
    """Return the seconds to the `times`-th `word`, None if the output ends or LIMIT passes before."""
    import threading

    assert process.stdout
    timer = threading.Timer(LIMIT, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    try:
        for line in process.stdout:
            times -= line.count(word)
            if times <= 0:
                return time.perf_counter() - started
    finally:
        timer.cancel()
    return None
