"""Reading of run folders as plain values; rows are flat, so `pandas.DataFrame(run.rows)` is a table."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pfedmoe_mpi.config import recorded
from pfedmoe_mpi.config.config import REFERENCES
from pfedmoe_mpi.errors import CheckpointError, UserError
from pfedmoe_mpi.federation.selection import TEST, VALIDATION, best, exhausted
from pfedmoe_mpi.models.names import labels
from pfedmoe_mpi.names import check_reachable, check_text
from pfedmoe_mpi.report.names import Names
from pfedmoe_mpi.storage import measured, untrusted_json
from pfedmoe_mpi.storage.columns import ClientColumns
from pfedmoe_mpi.user_code import label

if TYPE_CHECKING:
    from pfedmoe_mpi.checkpoint.confusion import Confusion
    from pfedmoe_mpi.client_model import ClientModel
    from pfedmoe_mpi.report.client_test_rows import TestRows

T = TypeVar("T")
STARTS = ("start", "restart")
SELECT = ("validation", "test", "last")  # the best round on validation rows, the best on test rows, the last
CHOICE, CHOSEN_RUNS = "selected.toml", "fresh"  # of `reproduce --select`: its choice, the runs chosen so
DRIFT = ["drift.forgetting", "drift.recovery"]  # columns even of runs without a change of concept


class RunFolderError(UserError):
    """A folder that is not a run folder, or a run without anything to report."""


class NoRoundError(RunFolderError):
    """A run that has not finished its first round."""


@dataclass(frozen=True, eq=False)
class Run:
    """The contents of a run folder.

    `config` has dotted names; `history` holds the rows of metrics.jsonl, and as `clients` their numbers by
    client; `events` holds the rows of events.jsonl. `select` is the round whose accuracies are reported, one
    of SELECT. `trunk` is the run that a fork branched off, where that is reported, too.
    """

    path: Path
    config: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    select: str = "last"
    trunk: Run | None = None

    @property
    def algorithm(self) -> str:
        return str(self.config["algorithm"])

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def planned(self) -> int:
        """The number of rounds that the configuration sets."""
        return int(self.config["rounds"])

    @property
    def done(self) -> int:
        """The number of complete rounds."""
        return int(self.history[-1]["round"])

    @property
    def finished(self) -> bool:
        return self.done >= self.planned or self.ended_early

    @property
    def ended_early(self) -> bool:
        """Whether `run.patience` ended it before the planned rounds."""
        patience = int(self.config.get("run.patience", 0))
        return self.done < self.planned and exhausted(self.history, patience, self.forked)

    @property
    def forked(self) -> int:
        """How many of its rounds are another run's; none of these is its best."""
        return int(self.config.get("run.forked", 0))

    @property
    def last(self) -> Mapping[str, Any]:
        """The last row in which clients were measured, else the last row."""
        return next(
            (row for row in reversed(self.history) if row["accuracy"]["mean"] is not None), self.history[-1]
        )

    @property
    def chosen(self) -> Mapping[str, Any] | None:
        """The row of the round that validation rows choose, the first of the best; None without such rows."""
        return best(self.history, on=VALIDATION, after=self.forked)

    @property
    def selected(self) -> Mapping[str, Any]:
        """The row whose accuracies are reported, by `select`."""
        if self.select == "last":
            return self.last
        on = VALIDATION if self.select == "validation" else TEST
        return best(self.history, on=on, after=self.forked) or self.last

    @property
    def newest(self) -> Path:
        """Its newest complete checkpoint."""
        return max(self.path.glob("checkpoints/round-??????.h5"))

    def model(self, client: int) -> ClientModel:
        """Return a client's model after the last checkpoint, as `load_client` does."""
        from pfedmoe_mpi import client_model  # imports torch, which reports do not need

        return client_model.load(self.newest, client)

    def test_rows(self, client: int) -> TestRows:
        """Return row numbers, samples and labels of a client's test rows; reads the run's data."""
        from pfedmoe_mpi.report import client_test_rows

        return client_test_rows.read(self.newest, client)

    @property
    def clients(self) -> int:
        """The number of clients N."""
        columns = self.last["clients"]
        return columns.clients if isinstance(columns, ClientColumns) else len(columns["accuracy"])

    @property
    def digests(self) -> tuple[str, str] | None:
        """The digests of its data and partition; None in a run of an earlier version."""
        data, partition = (self.started_with(f"{name}_digest") for name in ("data", "partition"))
        return None if data is None or partition is None else (str(data), str(partition))

    @property
    def client_names(self) -> tuple[str, ...]:
        """The names of the data's or the split's clients, such as hospitals; empty if there are none."""
        names = self.started_with("client_names")
        named = self.config.get("partition.kind") in {"natural", "file"}
        known = named and isinstance(names, list) and len(names) == self.clients
        return tuple(map(str, names)) if known else ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; empty if they have none but their numbers."""
        names = self.started_with("class_names")
        return tuple(map(str, names)) if isinstance(names, list) else ()

    @property
    def names(self) -> Names:
        """The names of clients and classes."""
        return Names(self.client_names, self.class_names)

    @property
    def client_labels(self) -> tuple[str, ...]:
        """The clients' names, else their numbers."""
        return self.client_names or tuple(map(str, range(self.clients)))

    def architecture(self, client: int) -> str:
        """Return the name of a client's architecture."""
        pool = self.config["model.pool"]
        return str(pool[client % len(pool)])

    def absent_clients(self, round: int) -> frozenset[int]:
        """Return the clients that had not trained by a round: they never train, or join later.

        Taken from the event of the newest start; means over clients exclude them.
        """
        try:
            never, late = untrusted_json.parse(self.started_with("samples"), "samples")["absent"]
            return frozenset(never if round >= int(self.config["join.round"]) else [*never, *late])
        except (ValueError, KeyError, TypeError):  # a run of an earlier version, or too many clients to list
            return frozenset()

    @cached_property
    def confusion(self) -> Confusion | None:
        """The confusion matrices of the last evaluation in its newest checkpoint; None if it has none."""
        from pfedmoe_mpi import checkpoint  # imports torch, which rows do not need

        tried: set[Path] = set()
        while path := checkpoint.newest(self.path / "checkpoints", tried):
            tried.add(path)
            with suppress(CheckpointError), checkpoint.open_verified(path) as loaded:
                return loaded.confusion
        return None

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One flat dict per round: `round`, `accuracy.mean`, `seconds.train`, …; lists stay lists."""
        run = {"seed": self.seed, "algorithm": self.algorithm}
        flat = [_flat({**row, "clients": {}}) for row in self.history]
        # A value that is null in one row may be an object in another; such a name is not a column.
        names = dict.fromkeys([*(name for row in flat for name in row), *DRIFT])
        objects = {name.rpartition(".")[0] for name in names}
        return [{**run, **{name: row.get(name) for name in names if name not in objects}} for row in flat]

    @cached_property
    def client_rows(self) -> list[dict[str, Any]]:
        """One flat dict per round and client: `name`, `accuracy`, `loss`, `alpha`, `auc`, …"""
        rows = []
        labels_of_clients = self.client_labels
        for row in self.history:
            metrics = dict(row["clients"])
            for client in range(len(metrics["accuracy"])):
                values = {name: column[client] for name, column in metrics.items() if column}
                keys = {"round": row["round"], "client": client, "name": labels_of_clients[client]}
                keys["architecture"] = self.architecture(client)
                rows.append({"seed": self.seed, "algorithm": self.algorithm, **keys, **values})
        return rows

    def started_with(self, name: str) -> Any:
        """Return a field of the newest start or restart that has it, else None."""
        starts = [event for event in self.events if event["event"] in STARTS]
        return next((event[name] for event in reversed(starts) if event.get(name) is not None), None)


def numbers(row: Mapping[str, Any], name: str) -> np.ndarray:
    """Return the clients' numbers of this name in a row of the history, float64 (N,), NaN for null."""
    columns = row["clients"]
    return columns.array(name) if isinstance(columns, ClientColumns) else np.array(columns[name], float)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def load_run(path: str | os.PathLike[str]) -> Run:
    """Read a run folder, finished or not.

    Raises:
        RunFolderError: this is not a run folder, it has no finished round yet, or its files are damaged.
    """
    folder = Path(path)
    check_text("the run folder", str(folder), RunFolderError)
    check_reachable(folder, RunFolderError)
    if not folder.exists():
        raise RunFolderError(f"{folder} does not exist", "name a run folder: pfedmoe-mpi report runs/NAME")
    if not folder.is_dir():
        raise RunFolderError(
            f"{folder} is a file, not a run folder", "name the folder that contains config.toml"
        )
    if not (folder / "config.toml").is_file():
        killed = any(folder.glob("checkpoints/round-*.h5"))  # between its first checkpoint and config.toml
        remedy = "name a run folder: pfedmoe-mpi report runs/NAME"
        raise RunFolderError(
            f"{folder} is not a run folder: it has no config.toml",
            f"resume its start: pfedmoe-mpi restart {folder}" if killed else remedy,
        )
    settings = _settings(folder / "config.toml")
    history = _history(folder / "metrics.jsonl")
    if not history:
        remedy = f"wait for its first round; if the run has ended: pfedmoe-mpi restart {folder}"
        raise NoRoundError(f"the run {folder} has no finished round yet", remedy)
    path = folder / "events.jsonl"
    remedy = f"correct it, or set it aside: mv {path} {path}.1"
    events = _read(untrusted_json.read_events, path, remedy)
    return Run(folder, settings, history, events)


def selection(runs: Sequence[Run]) -> str:
    """Return which round is reported by default: the best on validation rows if all runs have such rows."""
    return "validation" if all(run.chosen for run in runs) else "last"


def load_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read several runs, and return notes on those left out; a folder of run folders means all of them.

    Raises:
        RunFolderError: see `load_run`, except that runs without a finished round in a folder of run folders
            are left out; or a run is named twice.
    """
    folders: dict[Path, bool] = {}  # run folder: whether it was named itself
    for path in paths:
        for folder in _below(path) or [path]:
            if folder.resolve() in {other.resolve() for other in folders}:
                raise RunFolderError(f"{folder} is named twice", "name each run once")
            folders[folder] = folder == path
    runs: list[Run] = []
    left_out: list[NoRoundError] = []
    for folder, named in folders.items():
        try:
            runs.append(load_run(folder))
        except NoRoundError as error:
            if named:
                raise
            left_out.append(error)
    if not runs:
        raise left_out[0]
    return runs, [f"left out: {error.problem}" for error in left_out]


def _below(path: Path) -> list[Path]:
    """Return the run folders in a folder that is not one itself; after a choice, those of its result."""
    check_reachable(path, RunFolderError)
    if (path / "config.toml").exists() or not path.is_dir():
        return []
    path = path / CHOSEN_RUNS if (path / CHOICE).is_file() else path
    return [toml.parent for toml in sorted(path.glob("*/config.toml"))]


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = _flat(recorded.complete(tomllib.loads(path.read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise RunFolderError(
            f"cannot read {path}: {error}", "name a folder that a run has written"
        ) from error
    kinds = {"algorithm": str, "seed": int, "rounds": int, "model.pool": list}
    wrong = [
        name for name, kind in kinds.items() if not isinstance(settings.get(name), kind) or not settings[name]
    ]
    wrong = [name for name in wrong if settings.get(name) != 0 or name != "seed"]
    if wrong:
        problem = f"{path} is not the configuration of a run: it does not set {', '.join(wrong)}"
        raise RunFolderError(problem, "name a folder that a run has written")
    return _with_short_names(recorded.with_defaults(settings))


def _with_short_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with short names in place of references to the user's own code."""
    pool = [str(name) for name in settings["model.pool"]]
    short = {"algorithm": label(settings["algorithm"]), "model.pool": list(labels(pool))}
    for name in set(REFERENCES) - set(short):
        if isinstance(settings.get(name), str):
            short[name] = labels([*pool, settings[name]])[-1]
    return {**settings, **short}


def _history(path: Path) -> list[dict[str, Any]]:
    """Return the rows, in order; a partial last line, left by a killed run, is dropped."""
    remedy = f"rewrite the file from the checkpoint: pfedmoe-mpi restart {path.parent}"
    rows = _read(untrusted_json.read_lines, path, remedy) if path.exists() else []
    for number, row in enumerate(rows, 1):
        if number == len(rows) and row is None:
            rows = rows[:-1]
            break
        if not _is_row(row) or (number > 1 and row["round"] <= rows[number - 2]["round"]):
            problem = f"line {number} of {path} is not the row of a round"
            raise RunFolderError(problem, remedy)
    return _with_columns(rows, path.parent / measured.FOLDER, remedy)


def _with_columns(rows: list[dict[str, Any]], folder: Path, remedy: str) -> list[dict[str, Any]]:
    """Return the rows with their clients' numbers; rows of an earlier version hold them themselves.

    Raises:
        RunFolderError: the numbers are missing or damaged.
    """
    rounds = [row["round"] for row in rows if "clients" not in row]
    found = _read(lambda path: measured.read(path, rounds), folder, remedy) if rounds else {}
    joined = [{**row, "clients": row.get("clients", found.get(row["round"]))} for row in rows]
    for row in joined:
        known = row["clients"] is not None
        measured_clients = known and any(value is not None for value in row["clients"]["accuracy"])
        if not known or (row["accuracy"]["mean"] is not None and not measured_clients):
            raise RunFolderError(f"{folder} lacks the clients' numbers of round {row['round']}", remedy)
    return joined


def _is_row(row: Any) -> bool:
    try:
        names = ("accuracy", "loss", "alpha", "samples")
        columns = row["clients"] if "clients" in row else dict.fromkeys(names, ())
        return (
            isinstance(row["round"], int)
            and isinstance(row["cohort"], list)
            and all(isinstance(row[name]["mean"], float | None) for name in ("accuracy", "accuracy_cohort"))
            and all(isinstance(row[name], float | None) for name in ("train_loss", "rss_mb"))
            and isinstance(row["seconds"]["total"], float | None)
            and isinstance(row["bytes"], dict)
            and len({len(columns[name]) for name in names}) == 1
        )
    except (KeyError, TypeError):
        return False


def _read(reader: Callable[[Path], T], path: Path, remedy: str) -> T:
    """Return what `reader` reads of a file or folder.

    Raises:
        RunFolderError: the file cannot be read, or is damaged in a way that no killed run leaves it.
    """
    try:
        return reader(path)
    except (OSError, untrusted_json.UnusableError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}", remedy) from error
