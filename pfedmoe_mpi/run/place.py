"""Where a run may be written: names of new folders, and what makes a folder taken.

A folder with `config.toml` or a checkpoint can be restarted; without both, and without the rest of a run, it
counts as empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from fnmatch import fnmatch
from itertools import count
from pathlib import Path

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.checkpoint import frozen
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.names import check_reachable
from pfedmoe_mpi.run import curves

# A run leaves one of these, however early it ends.
TRACES = ("config.toml", "checkpoints", "events.jsonl", "log")
# What a start leaves in subfolders that ended before the folder held a run; each start may use such a folder.
LEFT_BY_START = {
    "log": ("rank-*.txt", "node-*.txt"),
    "checkpoints": (".*",),
    frozen.FOLDER: ("*",),
    curves.FOLDER: ("*",),
}
UNFINISHED = ".config.toml.tmp"  # the configuration, before it is renamed


def default(algorithm: str) -> Path:
    """Return runs/ALGORITHM-TIME, to be created with a number appended if it exists."""
    return Path("runs").absolute() / f"{algorithm}-{datetime.now():%Y%m%d-%H%M%S}"


def numbered(base: Path, joint: str) -> Iterator[Path]:
    """Yield `base`, base-2, base-3, …"""
    yield base
    for number in count(2):
        yield base.with_name(f"{base.name}{joint}{number}")


def resumable(folder: Path) -> bool:
    """Return whether a folder holds a run: its configuration, or a checkpoint, which contains that."""
    return (folder / "config.toml").is_file() or bool(checkpoint.newest_first(folder / "checkpoints"))


def refuse_existing(path: Path, force: bool) -> None:
    """Raise ConfigError if the folder holds anything and may not be renamed, or cannot be reached."""
    check_reachable(path, ConfigError)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file, not a run folder", "choose another --run.dir")
    if not holds_anything(path):
        return
    if not any((path / name).exists() for name in TRACES):
        raise ConfigError(f"the folder {path} is not empty and not a run folder", "choose another --run.dir")
    if force:
        return
    others = "--run.force true renames it, --run.dir NEW uses another one"
    if resumable(path):
        problem = f"the run folder {path} exists already"
        raise ConfigError(problem, f"`restart {path}` resumes it, {others}")
    problem = f"the run folder {path} exists already, but has neither checkpoints nor config.toml"
    raise ConfigError(problem, others)


def holds_anything(folder: Path) -> bool:
    """Return whether a folder holds anything except what a start may leave that ended early."""
    try:
        return folder.is_dir() and not all(map(_left_by_start, folder.iterdir()))
    except OSError as error:
        problem = f"{folder} cannot be listed: {error.strerror}"
        raise ConfigError(problem, "choose another --run.dir") from error


def _left_by_start(path: Path) -> bool:
    """Return whether a start that ended before the folder held a run may have left this file or folder."""
    if path.is_dir():
        patterns = LEFT_BY_START.get(path.name, ())
        names = [child.name for child in path.iterdir()] if patterns else []
        return bool(patterns) and all(any(fnmatch(name, each) for each in patterns) for name in names)
    return path.name == ".lock" or fnmatch(path.name, UNFINISHED)


def make_first_free(base: Path) -> Path:
    """Create the first of BASE, BASE-2, … that does not exist; of runs that start together, each gets one."""
    base.parent.mkdir(parents=True, exist_ok=True)
    for path in numbered(base, "-"):
        with suppress(FileExistsError):
            path.mkdir()
            break
    return path
