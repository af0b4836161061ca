"""`bench start`: how long a job takes to begin, against the same ranks merely importing torch.

Runs without a launcher and starts one itself, because no process may be started once MPI runs.
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
from pfedmoe_mpi.errors import EXIT_DONE, ConfigError, LaunchError
from pfedmoe_mpi.mpi import device

RANKS = 16  # the README's first command
REPEATS = 3
LIMIT = 600.0  # seconds for one start
IMPORT = "import torch; print('imported', flush=True)"


def run(words: Sequence[str], flags: Mapping[str, Any]) -> int:
    """Print the table. `words` may hold the number of ranks.

    Raises:
        ConfigError: another word, or more than one.
        LaunchError: under a launcher, or there is none, or the job fails.
    """
    if len(words) > 1 or not all(word.isdecimal() and int(word) for word in words):
        raise ConfigError(f"bench start takes a number of ranks, not {' '.join(words)}", "bench start 16")
    if environment.launched_size(os.environ) > 1:
        raise LaunchError("bench start launches ranks itself", "leave out mpirun: bench start 16")
    ranks = int(words[0]) if words else RANKS
    command = _launcher(ranks)
    with tempfile.TemporaryDirectory(prefix="pfedmoe-bench-") as folder:
        number = 0

        def ours() -> float:
            nonlocal number
            number += 1
            settings = [
                f"--{name}={value}" for name, value in flags.items() if name not in {"rounds", "run.dir"}
            ]
            own = ["--rounds=1", f"--run.dir={folder}/{number}"]
            return _seconds_until([*command, "-m", "pfedmoe_mpi", *settings, *own], "run folder ", 1)

        def reference() -> float:
            return _seconds_until([*command, "-c", IMPORT], "imported", ranks)

        print(f"{device.processor()}: {environment.CORES} cores, {time.strftime('%Y-%m-%d %H:%M %z')}")
        print(timing.HEADING, flush=True)
        pair = timing.side_by_side(ours, reference, REPEATS)
    print(pair.line(f"start of {ranks} ranks to round 1 vs importing torch", 1.2).text(), flush=True)
    return EXIT_DONE


def _launcher(ranks: int) -> list[str]:
    """The command that starts Python on that many ranks of this host, more than it has cores if need be."""
    beside = str(Path(sys.executable).parent / "mpirun")
    found = shutil.which("mpirun") or shutil.which("mpiexec") or shutil.which(beside)
    if not found:
        raise LaunchError(
            "there is no mpirun", "load the cluster's MPI module, or pip install 'pfedmoe_mpi[mpich]'"
        )
    version = subprocess.run(
        [found, "--version"], capture_output=True, text=True, check=False, timeout=60
    ).stdout
    more = ["--oversubscribe"] if "Open MPI" in version or "OpenRTE" in version else []
    return [found, "-n", str(ranks), *more, sys.executable]


def _seconds_until(command: Sequence[str], word: str, times: int) -> float:
    """Start the command, wait for the n-th `word` of its output, let it end; the seconds to that word."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
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
                f"`{' '.join(command)}` failed with code {process.returncode}:\n{tail}", "mend that first"
            )
    return seconds


def _read_until(process: subprocess.Popen[str], word: str, times: int, started: float) -> float | None:
    """Seconds to the n-th `word`, None if the output ends or the limit passes before."""
    import threading

    assert process.stdout
    watch = threading.Timer(LIMIT, os.killpg, (process.pid, signal.SIGKILL))
    watch.start()
    try:
        for line in process.stdout:
            times -= line.count(word)
            if times <= 0:
                return time.perf_counter() - started
    finally:
        watch.cancel()
    return None
