"""The run folder: configuration, metrics, events, logs and checkpoints of one run.

Rank 0 writes everything except the other ranks' logs, and holds the folder's lock while it writes. An
existing folder is refused or, with `run.force`, renamed. Only checkpoints beyond `run.keep` are ever deleted.
Before every write and deletion, `RunFolder.check` asks whether the path still leads to the locked folder.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from pfedmoe_mpi.checkpoint import Checkpoint, pack
from pfedmoe_mpi.errors import CheckpointError, ConfigError
from pfedmoe_mpi.federation import metrics
from pfedmoe_mpi.log import LOGGER
from pfedmoe_mpi.run import logs, old_checkpoints, place
from pfedmoe_mpi.run.place import holds_anything, make_first_free, numbered, refuse_existing
from pfedmoe_mpi.storage import durable, measured, untrusted_json
from pfedmoe_mpi.storage.lock import Lock

# Seconds to wait for the holder of a lock to disappear: the last rank of a killed job on this host, or the
# lease that a file server grants to a crashed host.
PATIENCE_HERE, PATIENCE_ELSEWHERE = 10.0, 120.0


class RunFolder:
    """The files of a run, by their meaning. As a context manager it releases its lock at the end."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path))  # resolved once: a link may be repointed during the run
        self._lock: Lock | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.unlock()

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def measured(self) -> Path:
        """The folder of clients' numbers by round."""
        return self.path / measured.FOLDER

    @cached_property
    def checkpoints(self) -> Path:
        """Their folder, which may be a link to another disk; resolved once, as `path` is."""
        return Path(os.path.realpath(self.path / "checkpoints"))

    @property
    def best(self) -> Path:
        return self.checkpoints / "best.h5"

    @property
    def resumable(self) -> bool:
        """Whether the folder holds a run: its configuration, or a checkpoint, which contains that."""
        return place.resumable(self.path)

    def create(self, force: bool, config_toml: str, numbered: bool = False) -> Path:
        """Create and lock a run folder without any rounds; return its path.

        Until the folder has a configuration or a checkpoint it counts as empty: a start that is killed
        before that leaves nothing that hinders the next one.

        Args:
            force: rename an earlier run folder.
            config_toml: the configuration, written last, with which the folder is a run; empty if its first
                checkpoint does that, because the run resumes from a checkpoint of another folder.
            numbered: use the first of PATH, PATH-2, PATH-3, … that does not exist.

        Raises:
            ConfigError: the folder is in use, exists and may not be renamed, or cannot be written.
        """
        try:
            if numbered:
                self.path = make_first_free(self.path)
            with self._renamed(force):
                self.path.mkdir(parents=True, exist_ok=True)
                self.lock()
            refuse_existing(self.path, force=False)  # the previous holder may have filled it
            for unfinished in self.path.glob(place.UNFINISHED):
                unfinished.unlink()
            self.make_subfolders()
            if config_toml:
                durable.write_text(self.config, config_toml)
        except OSError as error:
            problem = f"the run folder cannot be created: {error}"
            raise ConfigError(problem, "choose another --run.dir") from error
        return self.path

    @contextmanager
    def _renamed(self, force: bool) -> Iterator[None]:
        """Rename an earlier run folder, and hold its lock until the block has locked the new one."""
        refuse_existing(self.path, force)
        if not holds_anything(self.path):
            yield
            return
        with RunFolder(self.path) as earlier:
            earlier.lock(patience=0.0)  # refuse to rename the folder of a running job
            free = numbered(self.path.with_name(self.path.name + ".old"), ".")
            renamed = self.path.rename(next(path for path in free if not path.exists()))
            print(f"the earlier run folder is now {renamed}", flush=True)
            yield

    def make_subfolders(self) -> None:
        """Create the folders of logs and checkpoints where they are missing.

        Raises:
            ConfigError: they cannot be created.
        """
        try:
            for folder in (self.path / "log", self.checkpoints):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            problem = f"the run folder {self.path} cannot be written: {error}"
            raise ConfigError(problem, "remove what is in the way, or choose another --run.dir") from error

    def lock(self, patience: float | None = None) -> None:
        """Lock the folder against other runs until this process ends.

        Args:
            patience: seconds to wait for another holder to disappear; None: by the host of the last start.

        Raises:
            ConfigError: another run uses the folder, or it cannot be written.
        """
        last = self.last_start
        host = last.get("host", platform.node())
        if patience is None:
            patience = PATIENCE_HERE if host == platform.node() else PATIENCE_ELSEWHERE
        try:
            self._lock = Lock(self.path / ".lock", patience)
        except (BlockingIOError, FileNotFoundError) as error:  # or another run has just renamed the folder
            who = f": process {last['pid']} on {host}, according to its last start" if "pid" in last else ""
            raise ConfigError(
                f"the run folder {self.path} is in use{who}",
                "wait for that run or end it, or choose another --run.dir",
            ) from error
        except OSError as error:
            problem = f"the run folder {self.path} cannot be written: {error}"
            raise ConfigError(problem, "choose another --run.dir") from error

    def unlock(self) -> None:
        """Release the lock."""
        if self._lock:
            self._lock.release()
            self._lock = None

    def check(self) -> None:
        """Check that the path leads to the folder that this run has locked, if it has.

        Raises:
            OSError: it leads to another folder, or to none.
        """
        if self._lock:
            self._lock.check()

    def describe(self, config_toml: str, history: Sequence[Mapping[str, Any]]) -> None:
        """Write metrics.jsonl, clients' numbers and config.toml when a run starts or resumes.

        Earlier rows of rounds that are not in the history are kept in metrics.jsonl.1, .2, …, and their
        clients' numbers in measured.1, .2, …

        Raises:
            ConfigError: they cannot be written.
        """
        try:
            self.check()
            self._keep_rows_after(len(history))
            self.rewrite_metrics(history)
            durable.write_text(self.config, config_toml)
        except OSError as error:
            problem = f"the run folder {self.path} cannot be written: {error}"
            raise ConfigError(
                problem, "free space, or resume in another folder with --run.dir NEW"
            ) from error

    def keep_code(self, texts: Mapping[str, str]) -> None:
        """Write the user's own files into `code`.

        Raises:
            ConfigError: they cannot be written.
        """
        try:
            for name, text in texts.items():
                path = self.path / "code" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                durable.write_text(path, text)
        except OSError as error:
            problem = f"the run folder {self.path} cannot be written: {error}"
            raise ConfigError(problem, "free space, or resume with --run.dir NEW") from error

    def complete(self, history: Sequence[Mapping[str, Any]], keep: int, newest: Path) -> None:
        """Write what a run killed between its last checkpoint and its end did not write.

        The arguments are also as for `complete_best`.

        Raises:
            ConfigError: it cannot be written.
        """
        try:
            rounds = [row["round"] for row in history]
            if self._metrics_rounds() != rounds or not measured.holds(self.measured, history):
                self.rewrite_metrics(history)
            self.complete_best(keep, newest)
            if not self.finished:
                self.event("finish", round=len(history))
        except OSError as error:
            problem = f"the run folder {self.path} cannot be written: {error}"
            raise ConfigError(problem, "free space, and restart the run again") from error

    def rounds_after(self, done: int) -> list[int]:
        """Return the rounds in metrics.jsonl that come after the first `done`.

        Raises:
            UnusableError: the file is damaged.
        """
        try:
            rows = untrusted_json.read_lines(self.metrics)
        except OSError:
            return []
        rounds = [row.get("round") for row in rows if isinstance(row, dict)]
        return [round for round in rounds if isinstance(round, int) and round > done]

    def _keep_rows_after(self, done: int) -> None:
        """Rename metrics.jsonl if it has rows of rounds that are trained again, and print which."""
        try:
            rounds = self.rounds_after(done)
            if not rounds:
                return
            several = (
                f"rounds {rounds[0]} to {rounds[-1]} are" if len(rounds) > 1 else f"round {rounds[0]} is"
            )
            text = f"{several} trained again, because no good round-*.h5 contains"
            text += " them" if len(rounds) > 1 else " it"
        except untrusted_json.UnusableError as error:
            text = f"{self.metrics.name} is damaged: {error}"
        names = (self.metrics.with_name(f"{self.metrics.name}.{number}") for number in count(1))
        both = ((name, self.measured.with_suffix(name.suffix)) for name in names)
        kept, kept_measured = next(pair for pair in both if not any(name.exists() for name in pair))
        if self.measured.is_dir():
            self.measured.rename(kept_measured)
        self.metrics.rename(kept)
        LOGGER.warning(text)
        print(f"{text}; the rows so far are kept in {kept}", flush=True)

    def _metrics_rounds(self) -> list[int] | None:
        """Return the rounds in metrics.jsonl, None if it is missing or broken."""
        try:
            return [row["round"] for row in untrusted_json.read_lines(self.metrics)]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def event(self, kind: str, **facts: Any) -> None:
        """Append a line to events.jsonl, after ending the half line that a killed run may have left."""
        self.check()
        line = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "event": kind, **facts}
        with open(self.path / "events.jsonl", "a+b") as file:
            file.seek(max(0, file.tell() - 1))
            torn = file.read() not in {b"", b"\n"}
            file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")

    def stops_without_progress(self) -> int:
        """Return how many of the last starts in a row were stopped before any client step was done."""
        number, began = 0, None
        for line in reversed(self._events()):
            if line.get("event") in {"start", "restart"}:
                began = line.get("round", 0)
            elif line.get("event") != "stop" or line.get("steps") or began not in (None, line.get("round")):
                break  # steps were done, or rounds by a start that was killed
            else:
                number += 1
        return number

    @property
    def finished(self) -> bool:
        """Whether the last event says that the run finished."""
        return self.last_event.get("event") == "finish"

    @property
    def last_event(self) -> Mapping[str, Any]:
        """The last event; empty without any."""
        return next(reversed(self._events()), {})

    @property
    def last_start(self) -> Mapping[str, Any]:
        """The last event of a start or restart; empty without any."""
        return next((e for e in reversed(self._events()) if e["event"] in {"start", "restart"}), {})

    def lineage(self) -> list[dict[str, Any]]:
        """Return the events of the starts that the rounds come from, in their order.

        A start before round 1, or a restart before the rounds of earlier ones, took the place of these. The
        first event is a restart if the rounds before it are of another folder.
        """
        lines: list[dict[str, Any]] = []
        for line in self._events():
            if line["event"] == "start":
                lines = [line]
            elif line["event"] == "restart":
                lines = [each for each in lines if progress(each) <= progress(line)] + [line]
        return lines

    def _events(self) -> list[dict[str, Any]]:
        """Return the complete lines of events.jsonl.

        Raises:
            ConfigError: a line was damaged by something else than the end of a run.
        """
        path = self.path / "events.jsonl"
        try:
            return untrusted_json.read_events(path)
        except untrusted_json.UnusableError as error:
            remedy = f"correct it, or set it aside: mv {path} {path}.1"
            raise ConfigError(f"{path} is damaged: {error}", remedy) from error

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one round to metrics.jsonl, without clients' numbers in columns."""
        self.check()
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(metrics.dumps(row) + "\n")

    def rewrite_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Replace clients' numbers, and then metrics.jsonl in one step, by the rounds of a checkpoint."""
        self.check()
        measured.rewrite(self.measured, history)
        durable.write_text(self.metrics, "".join(metrics.dumps(row) + "\n" for row in history))

    def append_measured(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write the clients' numbers of the last round of a history."""
        self.check()
        measured.append(self.measured, history)

    def keep_newest(self, number: int, written: Path) -> None:
        """Remove the checkpoints that are not among the `number` newest, as `old_checkpoints` does."""
        self.check()
        old_checkpoints.remove(self.checkpoints, self.best, number, written)

    def mark_best(self, written: Path) -> None:
        """Make best.h5 another name of a checkpoint just written."""
        self.check()
        temporary = self.checkpoints / ".best.tmp"
        temporary.unlink(missing_ok=True)
        with durable.removed_after_error(temporary):  # half of a copy would keep a full disk full
            try:
                os.link(written, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(written, temporary)
            durable.publish(temporary, self.best)

    def complete_best(self, keep: int, newest: Path) -> None:
        """Make best.h5 complete by itself, and remove the files that only it needed.

        Args:
            keep: how many of the complete checkpoints stay.
            newest: the last one of the run.

        Raises:
            OSError: it cannot be written; it still relies on other files.
        """
        self.check()
        with suppress(CheckpointError):  # there is none, or it is damaged
            pack.replace(self.best)
        self.keep_newest(keep, newest)

    def best_round(self) -> int | None:
        """Return the round of best.h5, None if it is missing or unreadable."""
        try:
            with Checkpoint(self.best) as best:
                return best.round
        except (OSError, CheckpointError, KeyError):
            return None

    def log_to_file(self, hosts: Sequence[str], rank: int) -> None:
        """Log to a file in `log`; the arguments and errors are those of `logs.log_to_file`."""
        logs.log_to_file(self.path / "log", hosts, rank)


def progress(start: Mapping[str, Any]) -> tuple[int, bool]:
    """Return how many rounds were done at the event of a start, and whether the next one was in progress."""
    return start.get("round") or 0, "-partial" in str(start.get("checkpoint"))
