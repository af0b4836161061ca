"""Jobs that a benchmark starts from outside of MPI, each within a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Collection, Sequence

from pfedmoe_mpi.bench.start import paths
from pfedmoe_mpi.errors import EXIT_DONE, LaunchError

Process = subprocess.Popen[str]


def run(
    command: Sequence[str],
    limit: float,
    read: Callable[[Process, str], None] = lambda process, line: None,
    codes: Collection[int] = (EXIT_DONE,),
) -> tuple[int, str]:
    """Run a command to its end; return its exit code and its output.

    Args:
        limit: seconds after which it is killed.
        read: is called with every line of the output when it comes.
        codes: the exit codes of success.

    Raises:
        LaunchError: the command fails, or takes longer.
    """
    on_term = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the job, too, as Ctrl-C does
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # the job inherits it
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONPATH": paths()},
        start_new_session=True,
    )
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    said: list[str] = []
    try:
        assert process.stdout
        for line in process.stdout:
            said.append(line)
            read(process, line)
        process.wait()
    finally:  # an interrupted benchmark leaves no ranks behind
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # a launcher that is killed leaves its ranks running
            process.wait()
        signal.signal(signal.SIGTERM, on_term)
    if process.returncode not in codes:
        tail = "".join(said)[-2000:].strip()
        raise LaunchError(
            f"`{' '.join(command)}` failed with code {process.returncode}:\n{tail}",
            "run this command alone to find its fault",
        )
    return process.returncode, "".join(said)
