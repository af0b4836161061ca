"""A job's log files: one for each rank, or one for each host of a wide job."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.log import LOGGER

MOST_FILES = 64  # ranks with a file each


def log_to_file(folder: Path, hosts: Sequence[str], rank: int) -> None:
    """Log to a file of this folder; close the log of an earlier run of this process.

    Args:
        hosts: the name of every rank's host.

    Raises:
        ConfigError: the log cannot be written.
    """
    for earlier in [handler for handler in LOGGER.handlers if isinstance(handler, _LogFile)]:
        LOGGER.removeHandler(earlier)
        earlier.close()
    try:
        handler = _LogFile(folder / file_name(hosts, rank), encoding="utf-8")
    except OSError as error:
        problem = f"the log of rank {rank} cannot be written: {error}"
        raise ConfigError(
            problem, "fix the file system, or resume in another folder with --run.dir NEW"
        ) from error
    who = f"rank {rank} " if len(hosts) > MOST_FILES else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(levelname)s %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)


def file_name(hosts: Sequence[str], rank: int) -> str:
    """Return `rank-0003.txt`, or beyond MOST_FILES ranks `node-0001.txt`, to which a host's ranks append.

    A parallel file system makes every file at a cost that all jobs share.
    """
    if len(hosts) <= MOST_FILES:
        return f"rank-{rank:04d}.txt"
    return f"node-{list(dict.fromkeys(hosts)).index(hosts[rank]):04d}.txt"


class _LogFile(logging.FileHandler):
    """A log file that ignores write errors: a full disk must not fill the terminal with tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None: ...
