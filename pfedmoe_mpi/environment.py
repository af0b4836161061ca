"""What the launcher, Slurm and this checkout say about the process. Needs neither torch nor MPI."""

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
    """Cores this process may use now, which on a shared machine are fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


CORES = cores()  # this module is imported before torch, whose OpenMP may shrink the mask
STARTED = time.time()
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)  # that ask for a stop


def launched_rank() -> int:
    """This process's rank as its launcher says, before MPI is started; 0 where there is none."""
    for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def launched_size(environment: Mapping[str, str]) -> int:
    """How many ranks the launcher started: PMI's or Open MPI's variable decides, else Slurm's; else 1."""
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return 1


def code_version() -> str:
    """Version, commit and dirty flag; asked for before MPI starts, which allows no subprocess later."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return __version__
    ask = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        found = subprocess.run(ask, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git here, or a slow file system
        found = ""
    return f"{__version__} {found}".strip()


def slurm_end() -> float | None:
    """When Slurm ends this job, as time.time(); None outside of Slurm or without a limit.

    Asked for before MPI starts, which allows no subprocess later.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    given = os.environ.get("SLURM_JOB_END_TIME", "")  # Slurm 23.02 and newer
    if given.isdigit() or not job:
        return float(given) if given.isdigit() else None
    ask = ["squeue", "--noheader", "--jobs", job, "--format", "%e"]
    seconds = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
    try:
        return float(subprocess.run(ask, env=seconds, capture_output=True, check=False, timeout=20).stdout)
    except (OSError, subprocess.SubprocessError, ValueError):  # no squeue on this node; NONE or N/A
        return None


def stop_at(walltime: float | str, end: float | None) -> float:
    """When to stop so that the job is over in time: a tenth of what there is before the limit, at most 60 s.

    Args:
        walltime: `run.walltime`: seconds since this program started, 0 for no limit, `auto` for Slurm's.
        end: what `slurm_end` tells.
    """
    left = (end or math.inf) - STARTED if walltime == "auto" else float(walltime) or math.inf
    return STARTED + left - min(60.0, max(0.0, left) / 10)
