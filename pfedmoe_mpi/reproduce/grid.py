"""A table of a paper as a file: base settings and the axes of a grid, expanded to runs with stable names.

    title = "What is compared"
    floor = 20                        # the fewest rounds that --scale leaves
    in_rounds = ["fedkd.ramp"]        # further settings that are counted in rounds and scaled with them

    [base]                            # settings of every run, as in a configuration file
    rounds = 500

    [axis.clients.n10]                # a point of the axis `clients`: its label, and what it stands for
    clients = 10
    [axis.clients.n50]
    clients = 50
    participation = 0.2

    [axis]
    algorithm = ["pfedmoe", "fedavg"] # short for points that set the setting of the axis's name
    seed = [0, 1, 2]

The runs are the product of the axes in the order of the file, the last one fastest, and are named by their
labels: `n50-pfedmoe-seed0` (a word is its own label, a number gets the setting's last name in front).
Relative paths count from the file. What a data source proposes for settings that the table leaves out is
taken as in any run, but for the rounds, which are the table's. Needs neither torch nor MPI.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

from pfedmoe_mpi import config
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.errors import ConfigError, UserError, nearest

KEYS = ("title", "floor", "in_rounds", "base", "axis")
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+]*")
# What a run of the table may have otherwise without being another one; `rounds` is told by `run.scale`.
HARMLESS = ("rounds", "data.path", "run.", "train.threads", "train.device", "eval.batch")
OURS = ("run.dir", "run.table", "run.cell", "run.scale", "run.altered")  # what `reproduce` sets itself


class TableError(ConfigError):
    """A table that cannot be read, or does not describe runs."""


@dataclass(frozen=True)
class Point:
    """A place on an axis: its label and the settings, by dotted name, that it stands for."""

    label: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A table file as read; `axes` in order, the last one varies fastest."""

    path: Path
    title: str
    floor: int
    in_rounds: tuple[str, ...]
    base: Mapping[str, Any]
    axes: Mapping[str, Sequence[Point]]

    @property
    def name(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class TableRun:
    """One run of a table; `planned`: the table's rounds, `group`: the name without the seed."""

    name: str
    group: str
    config: Config
    planned: int


def read(path: Path) -> Table:
    """Read a table file.

    Raises:
        TableError: the file is missing, no TOML, or not of this form.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TableError(f"there is no table {path}", "jobs/tables/ holds those of the papers") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TableError(f"{path} cannot be read as TOML: {error}", "mend the file") from error
    for name in tree:
        if name not in KEYS:
            raise _wrong(
                path, f"has an unknown key '{name}'{nearest(name, KEYS)}", f"it knows {', '.join(KEYS)}"
            )
    title, floor, also = tree.get("title", path.stem), tree.get("floor", 1), tree.get("in_rounds", [])
    if type(floor) is not int or floor < 1:
        raise _wrong(path, f"has floor = {floor!r}", "give the fewest rounds that --scale may leave")
    numbers = [name for name, field in config.fields().items() if field.annotation is int]
    if not isinstance(also, list) or not set(map(str, also)) <= set(numbers):
        raise _wrong(path, f"has in_rounds = {also!r}", 'name settings counted in rounds: ["fedkd.ramp"]')
    for name in ("base", "axis"):
        if not isinstance(tree.get(name, {}), dict):
            raise _wrong(path, f"has {name} = {tree[name]!r}", f"make it a section: [{name}]")
    base = _settings(path, "base", tree.get("base", {}))
    axes = {name: _points(path, name, points) for name, points in tree.get("axis", {}).items()}
    return Table(path, str(title), floor, tuple(also), base, axes)


def _wrong(path: Path, problem: str, remedy: str) -> TableError:
    return TableError(f"the table {path} {problem}", remedy)


def _settings(path: Path, where: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names, all known, none of them ours to set; paths count from the table's folder."""
    found = config.flatten(tree)
    for name in found:
        if name in OURS:
            raise _wrong(path, f"sets {name} in [{where}]", "leave it out: `reproduce` sets it for every run")
        if name not in config.fields():
            hint = nearest(name, config.fields())
            raise _wrong(path, f"sets an unknown {name} in [{where}]{hint}", "--help lists every setting")
    return config.located(found, path.resolve().parent)


def _points(path: Path, axis: str, given: Any) -> list[Point]:
    """The points of an axis, from sections by label or from a list of values of one setting."""
    if isinstance(given, dict) and given and all(isinstance(value, dict) for value in given.values()):
        points = [
            Point(label, _settings(path, f"axis.{axis}.{label}", tree)) for label, tree in given.items()
        ]
    elif isinstance(given, list) and given:
        setting = axis.replace("-", "_")
        points = [Point(_label(setting, v), _settings(path, "axis", {setting: v})) for v in given]
    else:
        dotted = f'"{axis}.{next(iter(given))}"' if isinstance(given, dict) and given else axis
        example = f"{dotted} = [1, 2] below [axis], or sections [axis.{axis}.LABEL]"
        raise _wrong(path, f"has an axis {axis} without points", example)
    for point in points:
        if not LABEL.fullmatch(point.label):
            remedy = "labels name folders: letters, digits, . _ and +; [axis.NAME.LABEL] gives it one"
            raise _wrong(path, f"has a label '{point.label}' on the axis {axis}", remedy)
    return points


def _label(setting: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{setting.rpartition('.')[2]}{str(value).lower()}"


def expand(table: Table, overrides: Mapping[str, Any], scale: float = 1.0) -> list[TableRun]:
    """Every run of a table, in order, each checked as a configuration.

    Args:
        overrides: settings of all runs, over those of the table; none of an axis.
        scale: of the rounds, in (0, 1]; never below the table's floor.

    Raises:
        TableError: a run that is no configuration, two runs of one name or of one configuration.
    """
    _check_overrides(table, overrides, scale)
    runs: list[TableRun] = []
    seen: dict[str, str] = {}
    for points in product(*table.axes.values()):
        made = _run(table, dict(zip(table.axes, points, strict=True)), overrides, scale)
        tree = {**config.flatten(config.to_tree(made.config)), "run.cell": ""}
        for kind, key in (("name", made.name), ("configuration", repr(sorted(tree.items())))):
            if key in seen:
                problem = f"has two runs of the same {kind}: {seen[key]} and {made.name}"
                raise _wrong(table.path, problem, "every point of its axes must make another run")
            seen[key] = made.name
        runs.append(made)
    return runs


def _check_overrides(table: Table, overrides: Mapping[str, Any], scale: float) -> None:
    if not 0 < scale <= 1:
        raise TableError(f"--scale {scale:g}: a share of the rounds is above 0 and at most 1", "--scale 0.1")
    for name in overrides:
        for axis, points in table.axes.items():
            if any(name in point.settings for point in points) and name != "data.path":
                remedy = "--only 'PATTERN' chooses among its runs"
                raise TableError(f"--{name} is on the axis {axis} of {table.path}", remedy)
        if name in OURS:
            raise TableError(f"--{name} is set by `reproduce` for every run", "--out FOLDER holds the runs")
    if "rounds" in overrides and scale != 1:
        raise TableError("--rounds and --scale both change the rounds", "give one of them")


def _run(table: Table, points: Mapping[str, Point], overrides: Mapping[str, Any], scale: float) -> TableRun:
    settings = dict(table.base)
    for point in points.values():
        settings |= point.settings
    name = "-".join(point.label for point in points.values()) or table.name
    try:
        planned = config.build(settings).rounds
        settings |= overrides
        made = config.build(settings)
    except UserError as error:
        raise TableError(f"{table.path}, run {name}: {error.problem}", error.remedy) from error
    rounds = made.rounds
    if scale < 1:
        rounds = min(rounds, max(table.floor, math.ceil(scale * rounds)))
    unscaled = config.flatten(made.model_dump())
    for other in table.in_rounds if rounds != planned else ():
        if other not in overrides:
            settings[other] = max(1, round(unscaled[other] * rounds / planned))
    settings |= {
        "rounds": rounds,
        "run.table": table.name,
        "run.cell": _cell(points, made.algorithm),
        "run.scale": rounds / planned,
        "run.altered": [n for n in overrides if not n.startswith(HARMLESS)],
    }
    group = "-".join(point.label for axis, point in points.items() if axis != "seed") or table.name
    return TableRun(name, group, config.build(settings), planned)


def _cell(points: Mapping[str, Point], algorithm: str) -> str:
    """COLUMN/ROW of the paper's table: the label of the axis `algorithm`, or the method, is the row."""
    column = [point.label for axis, point in points.items() if axis not in {"seed", "algorithm"}]
    row = points["algorithm"].label if "algorithm" in points else algorithm
    return f"{'-'.join(column)}/{row}"


def chosen(runs: Sequence[TableRun], only: str, task: str) -> list[TableRun]:
    """The runs whose names match one of `only` (shell patterns, comma-separated), of these number `task`.

    Raises:
        TableError: none does, or there is no such number.
    """
    patterns = [pattern.strip() for pattern in only.split(",") if pattern.strip()]
    found = [run for run in runs if not patterns or any(fnmatchcase(run.name, p) for p in patterns)]
    if not found:
        problem = f"no run of the table matches --only {only}"
        raise TableError(problem, f"names are like {runs[0].name}: --only '*{runs[0].name[-6:]}'")
    if not task:
        return found
    if not task.isdecimal() or int(task) >= len(found):
        raise TableError(f"--task {task}: there is no such run", f"tasks go from 0 to {len(found) - 1}")
    return [found[int(task)]]
