"""Facts from the launcher, Slurm and the checkout about this process. Needs neither torch nor MPI."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from pfedmoe_mpi._version import __version__


def cores() -> int:
    """Return how many cores this process may use now; a shared machine may have more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


CORES = cores()  # this module is imported before torch, whose OpenMP may shrink the mask
STARTED = time.time()
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


def code_version() -> str:
    """Return version, commit and dirty flag.

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
    """Return when Slurm ends this job, as time.time(); None outside of Slurm or without a limit.

    Call it before MPI starts: after that a process must not start a subprocess.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    end_time = os.environ.get("SLURM_JOB_END_TIME", "")  # Slurm 23.02 and newer
    if end_time.isdigit():
        return float(end_time)
    if not job:
        return None
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%e"]
    variables = {**os.environ, "SLURM_TIME_FORMAT": "%s"}  # seconds since the epoch
    try:
        return float(
            subprocess.run(command, env=variables, capture_output=True, check=False, timeout=20).stdout
        )
    except (OSError, subprocess.SubprocessError, ValueError):  # no squeue on this node; NONE or N/A
        return None


def stop_time(walltime: float | str, end: float | None) -> float:
    """Return when to stop, as time.time(), so that the job is over in time.

    The stop comes before the limit by a tenth of the available time, at most 60 s.

    Args:
        walltime: `run.walltime`: seconds from the program's start, 0 for no limit, `auto` for Slurm's limit.
        end: the result of `slurm_end`.
    """
    available = (end or math.inf) - STARTED if walltime == "auto" else float(walltime) or math.inf
    return STARTED + available - min(60.0, max(0.0, available) / 10)
