"""A run folder as plain Python values; rows are flat, so `pandas.DataFrame(run.rows)` is a table."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pfedmoe_mpi.errors import UserError

STARTS = ("start", "restart")
DRIFT = ["drift.forgetting", "drift.recovery"]  # columns of runs without a change of concept too


class RunFolderError(UserError):
    """A folder that is no run's, or a run of which there is nothing to report."""


class NoRoundError(RunFolderError):
    """A run that has not finished its first round."""


@dataclass(frozen=True, eq=False)
class Run:
    """What a run folder tells.

    `config` has dotted names; `history` are the rows of metrics.jsonl as they stand, `events` those of
    events.jsonl.
    """

    path: Path
    config: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]

    @property
    def algorithm(self) -> str:
        return str(self.config["algorithm"])

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def planned(self) -> int:
        """Rounds that were asked for."""
        return int(self.config["rounds"])

    @property
    def done(self) -> int:
        """Rounds that are complete."""
        return int(self.history[-1]["round"])

    @property
    def finished(self) -> bool:
        return self.done >= self.planned

    @property
    def last(self) -> Mapping[str, Any]:
        """The last row in which clients were measured, else the last row."""
        return next(
            (row for row in reversed(self.history) if row["accuracy"]["mean"] is not None), self.history[-1]
        )

    @property
    def clients(self) -> int:
        """The number of clients N."""
        return len(self.last["clients"]["accuracy"])

    def architecture(self, client: int) -> str:
        pool = self.config["model.pool"]
        return str(pool[client % len(pool)])

    def absent(self, round: int) -> frozenset[int]:
        """The clients that had not trained by a round, as the newest start tells: they never do, or join
        later. Means over clients are without them.
        """
        try:
            never, late = json.loads(self.started_with("samples"))["absent"]
            return frozenset(never if round >= int(self.config["join.round"]) else [*never, *late])
        except (ValueError, KeyError, TypeError):  # an earlier version's run, or too many to tell
            return frozenset()

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One flat dict per round: `round`, `accuracy.mean`, `seconds.train`, …; lists stay lists."""
        who = {"seed": self.seed, "algorithm": self.algorithm}
        flat = [_flat({**row, "clients": {}}) for row in self.history]
        # What is null in one row may be an object in another: every name of any row, but for such a null.
        names = dict.fromkeys([*(name for row in flat for name in row), *DRIFT])
        inner = {name.rpartition(".")[0] for name in names}
        return [{**who, **{name: row.get(name) for name in names if name not in inner}} for row in flat]

    @cached_property
    def client_rows(self) -> list[dict[str, Any]]:
        """One flat dict per round and client: `accuracy`, `loss`, `alpha`, `auc`, …"""
        found = []
        for row in self.history:
            held = row["clients"]
            for client in range(len(held["accuracy"])):
                values = {name: column[client] for name, column in held.items() if column}
                who = {"round": row["round"], "client": client, "architecture": self.architecture(client)}
                found.append({"seed": self.seed, "algorithm": self.algorithm, **who, **values})
        return found

    def started_with(self, name: str) -> Any:
        """A fact of the newest start that tells it, else None."""
        starts = [event for event in self.events if event["event"] in STARTS]
        return next((event[name] for event in reversed(starts) if event.get(name) is not None), None)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def load_run(path: str | os.PathLike[str]) -> Run:
    """Read a run folder, finished or not.

    Raises:
        RunFolderError: no run folder, no round in it yet, or files that are not a run's.
    """
    folder = Path(path)
    if not folder.exists():
        raise RunFolderError(f"there is no run folder {folder}", "check the path")
    if not folder.is_dir():
        raise RunFolderError(
            f"{folder} is a file, not a run folder", "name the folder that holds config.toml"
        )
    if not (folder / "config.toml").is_file():
        raise RunFolderError(f"{folder} is not a run folder: it has no config.toml", "check the path")
    settings = _settings(folder / "config.toml")
    history = _history(folder / "metrics.jsonl")
    if not history:
        remedy = f"wait for its first round, or `restart {folder}` if it has ended"
        raise NoRoundError(f"the run {folder} has no finished round yet", remedy)
    events = [
        event for event in _lines(folder / "events.jsonl") if isinstance(event, dict) and "event" in event
    ]
    return Run(folder, settings, history, events)


def load_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs of several folders, and what was left out; a folder of run folders stands for all of them.

    Raises:
        RunFolderError: as `load_run`, but for runs without a round in a folder of others; a run named twice.
    """
    folders: dict[Path, bool] = {}  # whether it was named itself
    for path in paths:
        for folder in _below(path) or [path]:
            if folder.resolve() in {known.resolve() for known in folders}:
                raise RunFolderError(f"{folder} is named twice", "name every run once")
            folders[folder] = folder == path
    runs: list[Run] = []
    without: list[NoRoundError] = []
    for folder, named in folders.items():
        try:
            runs.append(load_run(folder))
        except NoRoundError as error:
            if named:
                raise
            without.append(error)
    if not runs:
        raise without[0]
    return runs, [f"left out: {error.problem}" for error in without]


def _below(path: Path) -> list[Path]:
    """The run folders in a folder that is none."""
    if (path / "config.toml").exists() or not path.is_dir():
        return []
    return [toml.parent for toml in sorted(path.glob("*/config.toml"))]


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = _flat(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}", "name a folder that a run wrote") from error
    kinds = {"algorithm": str, "seed": int, "rounds": int, "model.pool": list}
    wrong = [
        name for name, kind in kinds.items() if not isinstance(settings.get(name), kind) or not settings[name]
    ]
    wrong = [name for name in wrong if settings.get(name) != 0 or name != "seed"]
    if wrong:
        problem = f"{path} is not the configuration of a run: it has no {', '.join(wrong)}"
        raise RunFolderError(problem, "name a folder that a run wrote")
    return settings


def _history(path: Path) -> list[dict[str, Any]]:
    """The rows, in order; half a line at the end is a killed run's."""
    rows = _lines(path)
    for number, row in enumerate(rows, 1):
        if number == len(rows) and row is None:
            return rows[:-1]
        if not _is_row(row) or (number > 1 and row["round"] <= rows[number - 2]["round"]):
            problem = f"line {number} of {path} is not the row of a round"
            raise RunFolderError(problem, f"`restart {path.parent}` writes the file anew from the checkpoint")
    return rows


def _is_row(row: Any) -> bool:
    try:
        columns = row["clients"]
        return (
            isinstance(row["round"], int)
            and isinstance(row["cohort"], list)
            and all(isinstance(row[name]["mean"], float | None) for name in ("accuracy", "accuracy_cohort"))
            and all(isinstance(row[name], float | None) for name in ("train_loss", "rss_mb"))
            and isinstance(row["seconds"]["total"], float | None)
            and isinstance(row["bytes"], dict)
            and len({len(columns[name]) for name in ("accuracy", "loss", "alpha", "samples")}) == 1
        )
    except (KeyError, TypeError):
        return False


def _lines(path: Path) -> list[Any]:
    """Each line's JSON value, None where it is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    values = []
    for line in text.splitlines():
        value = None
        with suppress(ValueError):
            value = json.loads(line)
        values.append(value)
    return values
