"""The run folder: configuration, metrics, events, logs, checkpoints of one run. Rank 0 writes, but for logs.

A folder that is in the way is refused or, with `run.force`, renamed; nothing is ever deleted but checkpoints
beyond `run.keep`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pfedmoe_mpi import checkpoint, metrics
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.launch import LOGGER


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


class RunFolder:
    """The files of a run by their meaning."""

    def __init__(self, path: Path) -> None:
        self.path = path

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
        if _holds_anything(path) and not force:
            raise ConfigError(
                f"the run folder {path} exists already",
                f"`restart {path}` goes on with it, --run.force true renames it, --run.dir chooses another",
            )

    def create(self, config_toml: str, force: bool) -> None:
        """Make the folder; `config.toml` appears last and whole: a folder that has one can be restarted."""
        try:
            self.refuse_existing(self.path, force)
            if _holds_anything(self.path):
                self.path.rename(_free(self.path.with_name(self.path.name + ".old"), "."))
            (self.path / "log").mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self.write_config(config_toml)
        except OSError as error:
            problem = f"the run folder cannot be made: {error}"
            raise ConfigError(problem, "choose another --run.dir") from error

    def write_config(self, config_toml: str) -> None:
        _replace(self.config, config_toml)

    def event(self, kind: str, **facts: Any) -> None:
        """Append one line to events.jsonl."""
        line = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "event": kind, **facts}
        with open(self.path / "events.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(metrics.dumps(row) + "\n")

    def rewrite_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """metrics.jsonl as the checkpoint knows it, replaced in one step."""
        _replace(self.path / "metrics.jsonl", "".join(metrics.dumps(row) + "\n" for row in history))

    def keep_newest(self, number: int) -> None:
        """Remove all but the newest checkpoints, and partial ones that a complete one has overtaken."""
        found = checkpoint.newest_first(self.checkpoints)
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
        checkpoint.sync_folder(self.checkpoints)

    def log_to_file(self, rank: int) -> None:
        """log/rank-0003.txt."""
        handler = logging.FileHandler(self.path / "log" / f"rank-{rank:04d}.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOGGER.addHandler(handler)
        LOGGER.setLevel(logging.INFO)


def _holds_anything(folder: Path) -> bool:
    try:
        return folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        problem = f"{folder} cannot be listed: {error.strerror}"
        raise ConfigError(problem, "choose another --run.dir") from error


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    checkpoint.sync_folder(path.parent)
