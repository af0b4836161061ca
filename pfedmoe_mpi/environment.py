"""Facts from the launcher, Slurm and the checkout about this process. Needs neither torch nor MPI."""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pfedmoe_mpi._version import __version__


def cores() -> int:
    """Return how many cores this process may use now; a shared machine may have more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


CORES = cores()  # this module is imported before torch, whose OpenMP may shrink the mask
STARTED = time.time()
OPEN_FILES = 64  # of a rank, at most: MPI's, libraries that are being loaded, logs and a checkpoint
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)  # requests to stop


def launched_rank() -> int:
    """Return the rank that the launcher gave this process, without starting MPI; 0 without a launcher."""
    for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def launched_size(environment: Mapping[str, str]) -> int:
    """Return how many ranks the launcher started, from PMI's or Open MPI's variable, else Slurm's, else 1."""
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return 1


def raise_file_limit() -> int:
    """Return how many files this process may open, after raising the limit to OPEN_FILES where it may."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if limit != unlimited and limit < OPEN_FILES:
        limit = OPEN_FILES if most == unlimited else min(most, OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    return OPEN_FILES if limit == unlimited else limit


@cache
def code_version() -> str:
    """Return version, commit and dirty flag, as at the first call.

    Call it before MPI starts: after that a process must not start a subprocess.
    """
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return __version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        commit = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # git is not installed, or the file system is slow
        commit = ""
    return f"{__version__} {commit}".strip()


def slurm_end() -> float | None:
    """Return when Slurm ends this job, as time.time(); None outside of a running job or without a limit.

    Slurm's variables outlive the job in a tmux or Jupyter session that it started, so Slurm is asked whether
    the job runs. A limit in the past is ignored with a note.

    Call it before MPI starts: after that a process must not start a subprocess.
    """
    job, variable = os.environ.get("SLURM_JOB_ID", ""), "SLURM_JOB_END_TIME"  # from Slurm 23.02 on
    if not job:
        return None
    answer = _squeue(job)
    if answer is None:
        end, source = os.environ.get(variable, ""), variable
    else:
        running = [words for words in map(str.split, answer.splitlines()) if words[:1] == [job]]
        end = next((words[2] for words in running if len(words) == 3 and words[1] != "PENDING"), "")
        source = f"the end of job {job} (SLURM_JOB_ID)"
    if not end.isdigit():  # the job is over, or NONE or N/A for no limit
        return None
    if float(end) > time.time():
        return float(end)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(end)))
    text = f"{source} = {end} is in the past ({when}) and ignored; --run.walltime SECONDS sets a limit"
    print(f"note: {text}", file=sys.stderr, flush=True)
    return None


def _squeue(job: str) -> str | None:
    """Return lines `JOB STATE END`, nothing for a job that is over, None if Slurm does not answer."""
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%A %T %e"]
    variables = {**os.environ, "SLURM_TIME_FORMAT": "%s"}  # seconds since the epoch
    try:
        result = subprocess.run(
            command,
            env=variables,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError, UnicodeError):  # no squeue on this node
        return None
    if result.returncode:
        return "" if "Invalid job id" in result.stderr else None
    return result.stdout


def stop_time(walltime: float | str, end: float | None) -> float:
    """Return when to stop, as time.time(), so that the job is over in time.

    The stop comes before the limit by a tenth of the available time, at most 60 s.

    Args:
        walltime: `run.walltime`: seconds from the program's start, 0 for no limit, `auto` for Slurm's limit.
        end: the result of `slurm_end`.
    """
    available = (end or math.inf) - STARTED if walltime == "auto" else float(walltime) or math.inf
    return STARTED + available - min(60.0, max(0.0, available) / 10)
