"""Jobs of this package's scripts, and of the command `conformance`, under mpirun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from support.launcher import clean_environment, openmpi_folder
from support.paths import with_support

MARK = "PFEDMOE_TEST_JOB"


@dataclass(frozen=True)
class JobResult:
    """A finished job: exit code, all output, and how many of its processes still run."""

    code: int
    output: str
    left: int


def run_module(
    script: str, *arguments: str, ranks: int = 4, limit: float = 120, mpi: str = "mpich"
) -> JobResult:
    """Run a module of this package; after `limit` seconds kill everything it started."""
    token = uuid.uuid4().hex
    launcher = [str(Path(sys.executable).parent / "mpirun")]
    if mpi == "openmpi":
        launcher = [str(openmpi_folder() / "bin" / "mpirun"), "--oversubscribe", "--allow-run-as-root"]
    job = subprocess.Popen(
        [*launcher, "-n", str(ranks), sys.executable, "-m", f"support.{script}", *arguments],
        env=with_support(clean_environment(mpi, {MARK: token})),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = job.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        for process in [job.pid, *job_processes(token)]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        output = job.communicate()[0] + f"\nkilled after {limit:g} s"
    deadline = time.monotonic() + 5
    while job_processes(token) and time.monotonic() < deadline:
        time.sleep(0.05)
    return JobResult(job.returncode, output, len(job_processes(token)))


def job_processes(token: str) -> list[int]:
    """Return the live processes of a job."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if token.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def run_conformance(*arguments: str, timeout: float) -> tuple[int, str]:
    """Run the command `conformance` on four ranks; kill the job after `timeout` seconds."""
    launcher = [str(Path(sys.executable).parent / "mpirun"), "-n", "4"]
    command = [*launcher, sys.executable, "-m", "pfedmoe_mpi", "conformance"]
    job = subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        output, _ = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        output = job.communicate()[0] + "\nkilled: the job hung"
    return job.returncode, output
