"""The run folder: configuration, metrics, events, logs, checkpoints of one run. Rank 0 writes, but for logs.

A folder that is in the way is refused or, with `run.force`, renamed; nothing is ever deleted but checkpoints
beyond `run.keep`. Whoever writes into it holds its lock. With `config.toml` it can be restarted.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.errors import CheckpointError, ConfigError
from pfedmoe_mpi.federation import metrics
from pfedmoe_mpi.log import LOGGER
from pfedmoe_mpi.storage import durable
from pfedmoe_mpi.storage.lock import Lock


def default(algorithm: str) -> Path:
    """runs/ALGORITHM-TIME, with a number behind it if two runs start in the same second."""
    base = Path("runs").absolute() / f"{algorithm}-{datetime.now():%Y%m%d-%H%M%S}"
    return _free(base)


def _free(base: Path, joint: str = "-") -> Path:
    """`base`, or the first of base-2, base-3, … that does not exist."""
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}{joint}{number}")
    return path


# Seconds that the holder of a lock may take to disappear: the last rank of a killed job on this host, or the
# lease that a file server grants to a host that has crashed.
PATIENCE_HERE, PATIENCE_ELSEWHERE = 10.0, 120.0


TRACES = ("config.toml", "checkpoints", "events.jsonl", "log")  # of a run, however early it ended


class RunFolder:
    """The files of a run by their meaning. As a context manager it is unlocked at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Lock | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.unlock()

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        return self.checkpoints / "best.h5"

    @staticmethod
    def refuse_existing(path: Path, force: bool) -> None:
        """Raise ConfigError if the folder holds anything and may not be renamed."""
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file, not a run folder", "choose another --run.dir")
        if _holds_anything(path) and not any((path / name).exists() for name in TRACES):
            raise ConfigError(f"{path} holds other things than a run", "choose another --run.dir")
        if _holds_anything(path) and not force:
            raise ConfigError(
                f"the run folder {path} exists already",
                f"`restart {path}` goes on with it, --run.force true renames it, --run.dir chooses another",
            )

    def create(self, force: bool) -> None:
        """Make and lock the folder, with nothing in it yet."""
        try:
            self.refuse_existing(self.path, force)
            if _holds_anything(self.path):
                self.lock(patience=0.0)  # not from under a run that goes on
                self.unlock()
                kept = self.path.rename(_free(self.path.with_name(self.path.name + ".old"), "."))
                print(f"the run folder that was here is now {kept}", flush=True)
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            self.refuse_existing(self.path, force=False)  # who held it before may have filled it
            (self.path / "log").mkdir(exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            problem = f"the run folder cannot be made: {error}"
            raise ConfigError(problem, "choose another --run.dir") from error

    def lock(self, patience: float | None = None) -> None:
        """Keep other runs out until this process ends.

        Raises:
            ConfigError: another run is in, or the folder cannot be written.
        """
        last: dict[str, Any] = next(
            (e for e in reversed(self._events()) if e["event"] in {"start", "restart"}), {}
        )
        host = last.get("host", platform.node())
        if patience is None:
            patience = PATIENCE_HERE if host == platform.node() else PATIENCE_ELSEWHERE
        try:
            self._lock = Lock(self.path / ".lock", patience)
        except BlockingIOError as error:
            who = f": process {last['pid']} on {host}, by its last start" if "pid" in last else ""
            raise ConfigError(
                f"the run folder {self.path} is in use{who}",
                "wait for that run or end it, or choose another --run.dir",
            ) from error
        except OSError as error:
            problem = f"the run folder {self.path} cannot be written: {error}"
            raise ConfigError(problem, "choose another --run.dir") from error

    def unlock(self) -> None:
        """Let others in."""
        if self._lock:
            self._lock.release()
            self._lock = None

    def describe(self, config_toml: str, history: Sequence[Mapping[str, Any]]) -> None:
        """metrics.jsonl and config.toml of a run that starts or goes on.

        Raises:
            ConfigError: they cannot be written.
        """
        try:
            self.rewrite_metrics(history)
            durable.write_text(self.config, config_toml)
        except OSError as error:
            problem = f"the run folder {self.path} cannot be written: {error}"
            raise ConfigError(problem, "make room, or go on in another --run.dir") from error

    def complete(self, history: Sequence[Mapping[str, Any]]) -> None:
        """What a run that was killed between its last checkpoint and its end had still to write."""
        if self._rounds_told() != [row["round"] for row in history]:
            self.rewrite_metrics(history)
        if not self.finished:
            self.event("finish", round=len(history))

    def _rounds_told(self) -> list[int] | None:
        """The rounds in metrics.jsonl, None if it is missing or broken."""
        try:
            lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            return [json.loads(line)["round"] for line in lines]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def event(self, kind: str, **facts: Any) -> None:
        """Append one line to events.jsonl, behind the half one of a killed run."""
        line = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "event": kind, **facts}
        with open(self.path / "events.jsonl", "a+b") as file:
            file.seek(max(0, file.tell() - 1))
            torn = file.read() not in {b"", b"\n"}
            file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")

    def stops_without_progress(self) -> int:
        """How many legs in a row, the newest first, were stopped before a client's step was done."""
        number, began = 0, None
        for line in reversed(self._events()):
            if line.get("event") in {"start", "restart"}:
                began = line.get("round", 0)
            elif line.get("event") != "stop" or line.get("steps") or began not in {None, line.get("round")}:
                break  # steps were done, or rounds by a leg that was killed
            else:
                number += 1
        return number

    @property
    def finished(self) -> bool:
        """Whether the last thing that happened is that the run came to its end."""
        return [line["event"] for line in self._events()][-1:] == ["finish"]

    def _events(self) -> list[dict[str, Any]]:
        """The lines of events.jsonl that are whole."""
        try:
            lines = (self.path / "events.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            with suppress(ValueError):  # half a line of a killed run
                found.append(json.loads(line))
        return [event for event in found if isinstance(event, dict) and "event" in event]

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(metrics.dumps(row) + "\n")

    def rewrite_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """metrics.jsonl as the checkpoint knows it, replaced in one step."""
        durable.write_text(self.path / "metrics.jsonl", "".join(metrics.dumps(row) + "\n" for row in history))

    def keep_newest(self, number: int, written: Path) -> None:
        """Remove all but the newest checkpoints, and partial ones that a complete one has overtaken.

        What seems newer than the one just written, a damaged file or a round that was begun anew, gets the
        suffix .unused.
        """
        found = checkpoint.newest_first(self.checkpoints)
        at = found.index(written) if written in found else 0  # gone already, as the whole folder may be
        newer, found = found[:at], found[at:]
        for path in newer:
            path.rename(path.with_name(f"{path.name}.unused"))
        complete = [path for path in found if "partial" not in path.stem]
        overtaken = found[found.index(complete[0]) :] if complete else []
        for path in [*complete[number:], *(p for p in overtaken if "partial" in p.stem)]:
            path.unlink(missing_ok=True)

    def mark_best(self, written: Path) -> None:
        """best.h5 becomes another name of a checkpoint just written."""
        temporary = self.checkpoints / ".best.tmp"
        temporary.unlink(missing_ok=True)
        try:
            os.link(written, temporary)
        except OSError:  # a file system without hard links
            import shutil

            shutil.copyfile(written, temporary)
        os.replace(temporary, self.best)
        durable.sync(self.checkpoints)

    def best_round(self) -> int | None:
        """The round of best.h5; None without one."""
        try:
            with Checkpoint(self.best) as held:
                return held.round
        except (OSError, CheckpointError, KeyError):
            return None

    def log_to_file(self, rank: int) -> None:
        """log/rank-0003.txt, and no longer that of an earlier run of this process.

        Raises:
            ConfigError: it cannot be written.
        """
        for earlier in [found for found in LOGGER.handlers if isinstance(found, _LogFile)]:
            LOGGER.removeHandler(earlier)
            earlier.close()
        try:
            handler = _LogFile(self.path / "log" / f"rank-{rank:04d}.txt", encoding="utf-8")
        except OSError as error:
            problem = f"the log of rank {rank} cannot be written: {error}"
            raise ConfigError(problem, "mend the file system, or go on in another --run.dir") from error
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOGGER.addHandler(handler)
        LOGGER.setLevel(logging.INFO)


class _LogFile(logging.FileHandler):
    """A log that cannot be written, on a full disk, is no reason to fill the terminal with tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None: ...


def _holds_anything(folder: Path) -> bool:
    """Anything but a lock, which a run that did not come to be may have left."""
    try:
        return folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir())
    except OSError as error:
        problem = f"{folder} cannot be listed: {error.strerror}"
        raise ConfigError(problem, "choose another --run.dir") from error
