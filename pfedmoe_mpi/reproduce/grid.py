"""Table files: base settings and the axes of a grid, expanded to runs with stable names.

    title = "What is compared"
    floor = 20                        # least number of rounds with --scale
    in_rounds = ["fedkd.ramp"]        # further settings in rounds, scaled with them

    [base]                            # settings of every run, as in a configuration file
    rounds = 500

    [axis.clients.n10]                # a point of the axis `clients`: its label and its settings
    clients = 10
    [axis.clients.n50]
    clients = 50
    participation = 0.2

    [axis]
    algorithm = ["pfedmoe", "fedavg"] # short for points that set the setting of that name
    seed = [0, 1, 2]

The runs are the product of the axes in the order of the file, those of a section (`train.lr`, `train.batch`)
one after the other; the last axis varies fastest. Their names are their labels, `n50-pfedmoe-seed0` (a string
is its own label, of a path its last part, of the user's own code its short name; other values follow the last
part of the setting's name). Relative paths are relative to the file's folder.
Settings that the table leaves out may be proposed by the data source, as in any run, except the number of
rounds, which is the table's. Needs neither torch nor MPI.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pfedmoe_mpi import config, user_code
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.errors import ConfigError, UserError, nearest

KEYS = ("title", "floor", "in_rounds", "base", "axis", "select")
RECORD = "chosen"  # how `reproduce --select` came to a table; read by reports
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+]*")
MOST_RUNS = 10_000  # at once: each is checked as a configuration, in about 3 ms
MOST_NAMES = 1_000_000  # compared with the patterns of --only
# Settings that may differ from the table without altering its runs; `run.scale` records a change of `rounds`.
PROCESSOR = ("train.threads", "train.device", "train.deterministic", "train.graphs", "train.samples_in")
HARMLESS = ("rounds", "data.path", "run.", *PROCESSOR, "eval.batch")
HARMFUL = "run.patience"  # not one of them
RESERVED = ("run.dir", "run.table", "run.cell", "run.scale", "run.altered")  # set by `reproduce`


class TableError(ConfigError):
    """A table that cannot be read, or does not describe runs."""


@dataclass(frozen=True)
class Point:
    """A point of an axis: its label and its settings by dotted name."""

    label: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """The contents of a table file; the last of the `axes` varies fastest."""

    path: Path
    title: str
    floor: int
    in_rounds: tuple[str, ...]
    base: Mapping[str, Any]
    axes: Mapping[str, Sequence[Point]]
    select: Mapping[str, Any] = field(default_factory=dict)  # for `selection`

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.path.stem

    @property
    def size(self) -> int:
        """The number of runs."""
        return math.prod(map(len, self.axes.values()))

    def points(self, number: int) -> dict[str, Point]:
        """Return the point on each axis of run `number`, from 0 to `size` - 1."""
        chosen: dict[str, Point] = {}
        for axis, points in reversed([*self.axes.items()]):
            number, place = divmod(number, len(points))
            chosen[axis] = points[place]
        return {axis: chosen[axis] for axis in self.axes}

    def run_name(self, number: int) -> str:
        """Return the name of run `number`; labels contain no `-`, so no two runs have the same name."""
        return "-".join(point.label for point in self.points(number).values()) or self.name


@dataclass(frozen=True)
class TableRun:
    """One run of a table; `group`: the name without the seed, `planned`: the table's number of rounds."""

    name: str
    group: str
    config: Config
    planned: int


def is_harmless(name: str) -> bool:
    """Return whether a setting may differ from the table without altering its runs."""
    return name.startswith(HARMLESS) and name != HARMFUL


def read(path: Path) -> Table:
    """Read a table file.

    Raises:
        TableError: the file is missing, is not TOML, or does not have this form.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise TableError(f"{path} does not exist", "the papers' tables are in jobs/tables/") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise TableError(f"cannot read {path} as TOML: {error}", f"correct {path}") from error
    for name in tree:
        if name not in {*KEYS, RECORD}:
            raise _error(
                path, f"has an unknown key '{name}'{nearest(name, KEYS)}", f"use one of {', '.join(KEYS)}"
            )
    title, floor, in_rounds = tree.get("title", path.stem), tree.get("floor", 1), tree.get("in_rounds", [])
    if type(floor) is not int or floor < 1:
        raise _error(
            path, f"has floor = {floor!r}", "set the least number of rounds with --scale: floor = 20"
        )
    known = _known(path, tree)
    integers = [name for name, field in known.items() if field.annotation is int]
    if not isinstance(in_rounds, list) or not set(map(str, in_rounds)) <= set(integers):
        remedy = 'list settings whose unit is rounds: in_rounds = ["fedkd.ramp"]'
        raise _error(path, f"has in_rounds = {in_rounds!r}", remedy)
    for name in ("base", "axis", "select"):
        if not isinstance(tree.get(name, {}), dict):
            raise _error(path, f"has {name} = {tree[name]!r}", f"write it as a section: [{name}]")
    base = _settings(path, "base", tree.get("base", {}), known)
    axes: dict[str, Sequence[Point]] = {}
    for name, points in _axes(tree.get("axis", {})):
        if name in axes:
            raise _error(path, f"has the axis {name} twice", "write its points in one place")
        axes[name] = _points(path, name, points, known)
    return Table(path, str(title), floor, tuple(in_rounds), base, axes, tree.get("select", {}))


def _error(path: Path, problem: str, remedy: str) -> TableError:
    return TableError(f"the table {path} {problem}", remedy)


def _known(path: Path, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return every setting by its dotted name, with those of the methods' files that the table names."""
    known = config.fields()
    for name, value in config.flatten(tree).items():
        if name.rpartition(".")[2] == "algorithm":
            for algorithm in value if isinstance(value, list) else [value]:
                known |= config.fields(user_code.located(str(algorithm), path.resolve().parent))
    return known


def _settings(path: Path, where: str, tree: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section's settings by dotted name, with paths relative to the table's folder.

    Raises:
        TableError: a setting does not exist, or is set by `reproduce`.
    """
    settings = config.flatten(tree)
    for name in settings:
        if name in RESERVED:
            raise _error(path, f"sets {name} in [{where}]", f"remove {name}: reproduce sets it for every run")
        if name not in known:
            hint = nearest(name, known)
            raise _error(
                path,
                f"sets an unknown {name} in [{where}]{hint}",
                "list all settings: pfedmoe-mpi run --help",
            )
    return config.located(settings, path.resolve().parent)


def _axes(tree: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each axis by its name; `train.lr = [1, 2]` is one, as in [base]."""
    for name, value in tree.items():
        if isinstance(value, dict) and any(isinstance(points, list) for points in value.values()):
            yield from _axes(value, f"{section}{name}.")
        else:
            yield section + name, value


def _points(path: Path, axis: str, value: Any, known: Mapping[str, Any]) -> list[Point]:
    """Return the points of an axis, from sections by label or from a list of values of one setting."""
    if isinstance(value, dict) and value and all(isinstance(tree, dict) for tree in value.values()):
        points = [
            Point(label, _settings(path, f"axis.{axis}.{label}", tree, known))
            for label, tree in value.items()
        ]
    elif isinstance(value, list) and value:
        setting = axis.replace("-", "_")
        points = [Point(_label(setting, v), _settings(path, "axis", {setting: v}, known)) for v in value]
    else:
        dotted = f'"{axis}.{next(iter(value))}"' if isinstance(value, dict) and value else axis
        remedy = f"write {dotted} = [1, 2] below [axis], or sections [axis.{axis}.LABEL]"
        raise _error(path, f"has an axis {axis} without points", remedy)
    for point in points:
        if not LABEL.fullmatch(point.label):
            remedy = "labels name folders, so use letters, digits, . _ and +: [axis.NAME.LABEL]"
            raise _error(path, f"has a label '{point.label}' on the axis {axis}", remedy)
    labels = [point.label for point in points]
    if len(set(labels)) < len(labels):
        twice = next(label for place, label in enumerate(labels) if label in labels[:place])
        problem = f"has two points with the label {twice} on the axis {axis}"
        raise _error(path, problem, "give every point of an axis another label: [axis.NAME.LABEL]")
    return points


def _label(setting: str, value: Any) -> str:
    """Return the label of a value in a list; texts are their own, files and folders by their last name."""
    name = setting.rpartition(".")[2]
    if isinstance(value, str):
        return user_code.label(value) if user_code.is_reference(value) else value.rpartition("/")[2]
    if isinstance(value, list):
        texts = all(isinstance(item, str) for item in value)
        items = [_label("", item) for item in value]
        return ("" if texts and items else name) + ("+".join(items) or "none")
    small = isinstance(value, float) and "e-" in str(value)  # labels have no -
    return name + (f"{Decimal(str(value)):f}" if small else str(value).lower())


def expand(
    table: Table, overrides: Mapping[str, Any], scale: float = 1.0, only: str = "", task: str = ""
) -> list[TableRun]:
    """Return the chosen runs of a table, in order, each checked as a configuration; no other run is built.

    Args:
        overrides: settings of all runs that replace those of the table; not settings of an axis.
        scale: factor of the rounds, in (0, 1]; the result is at least the table's floor.
        only: comma-separated shell patterns of names; empty for all runs.
        task: number of a single run of these, from 0; empty for all.

    Raises:
        TableError: there is no such run, a run is not a valid configuration, two runs have the same
            configuration, or there are too many runs to build.
    """
    _check_overrides(table, overrides, scale)
    runs: list[TableRun] = []
    earlier: dict[str, str] = {}  # configuration: the name of the run
    for number in _numbers(table, only, task):
        run = _run(table, table.points(number), overrides, scale)
        tree = {**config.flatten(config.to_tree(run.config)), "run.cell": ""}
        first = earlier.setdefault(repr(sorted(tree.items())), run.name)
        if first != run.name:
            problem = f"has two runs with the same configuration: {first} and {run.name}"
            raise _error(table.path, problem, "give every point of its axes other settings")
        runs.append(run)
    return runs


def _numbers(table: Table, only: str, task: str) -> Sequence[int]:
    """Return the numbers of the runs that `only` and `task` choose."""
    patterns = [pattern.strip() for pattern in only.split(",") if pattern.strip()]
    matching: Sequence[int] = range(table.size)
    number = table.size  # which len() cannot return from 2**63 on
    if patterns:
        _check_number(table, "compares names with --only for", number, MOST_NAMES, "--task 0")
        matching = list(_matching(table, patterns))
        number = len(matching)
    if not number:
        name = table.run_name(0)
        remedy = f"use a pattern of a name like {name}: --only '*{name[-6:]}'"
        raise TableError(f"--only = {only} matches no run of the table", remedy)
    if not task:
        choose = f"--only '{table.run_name(0)}' or --task 0"
        _check_number(table, "builds", number, MOST_RUNS, choose)
        return matching
    last = number - 1
    if not task.isdecimal() or len(task) > len(str(last)) or int(task) > last:
        raise TableError(f"--task = {task}: there is no such run", f"set --task from 0 to {last}")
    return matching[int(task) : int(task) + 1]


def _check_number(table: Table, does: str, number: int, most: int, choose: str) -> None:
    """Raise TableError if there are more runs than `most`."""
    if number > most:
        problem = f"has {number:,} runs here, and reproduce {does} at most {most:,}"
        raise _error(table.path, problem, f"choose fewer with {choose}, or give its axes fewer points")


def _matching(table: Table, patterns: Sequence[str]) -> Iterator[int]:
    """Yield the numbers of the runs whose names match a pattern."""
    for number in range(table.size):
        name = table.run_name(number)
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            yield number


def _check_overrides(table: Table, overrides: Mapping[str, Any], scale: float) -> None:
    if not 0 < scale <= 1:
        problem = f"--scale = {scale:g}: a share of the rounds is above 0 and at most 1"
        raise TableError(problem, "--scale 0.1 for a tenth of the rounds")
    for name in overrides:
        for axis, points in table.axes.items():
            if any(name in point.settings for point in points) and name != "data.path":
                problem = f"--{name} is set by the axis {axis} of {table.path}"
                raise TableError(problem, f"remove --{name}; choose runs of the axis with --only 'PATTERN'")
        if name in RESERVED:
            problem = f"--{name} is set by reproduce for every run"
            raise TableError(problem, f"remove --{name}; the runs are in the folder --out")
    if "rounds" in overrides and scale != 1:
        raise TableError("--rounds and --scale both change the rounds", "remove one of them")


def _run(table: Table, points: Mapping[str, Point], overrides: Mapping[str, Any], scale: float) -> TableRun:
    settings = dict(table.base)
    for point in points.values():
        settings |= point.settings
    known = config.fields(str(settings.get("algorithm", "")))
    settings = {name: value for name, value in settings.items() if name in known}  # no other file's
    name = "-".join(point.label for point in points.values()) or table.name
    try:
        planned = config.build(settings).rounds
        settings |= overrides
        requested = config.build(settings)
    except UserError as error:
        raise TableError(f"{table.path}, run {name}: {error.problem}", error.remedy) from error
    rounds = requested.rounds
    if scale < 1:
        rounds = min(rounds, max(table.floor, math.ceil(scale * rounds)))
    unscaled = config.flatten(requested.model_dump())
    for name_in_rounds in table.in_rounds if rounds != planned else ():
        if name_in_rounds not in overrides and name_in_rounds in unscaled:
            settings[name_in_rounds] = max(1, round(unscaled[name_in_rounds] * rounds / planned))
    settings |= {
        "rounds": rounds,
        "run.table": table.name,
        "run.cell": _cell(points, requested.method),
        "run.scale": rounds / planned,
        "run.altered": [n for n in overrides if not is_harmless(n)],
    }
    group = "-".join(point.label for axis, point in points.items() if axis != "seed") or table.name
    return TableRun(name, group, config.build(settings), planned)


def _cell(points: Mapping[str, Point], algorithm: str) -> str:
    """Return COLUMN/ROW of the paper's table; the row is the label of the axis `algorithm`, or the method."""
    column = [point.label for axis, point in points.items() if axis not in {"seed", "algorithm"}]
    row = points["algorithm"].label if "algorithm" in points else algorithm
    return f"{'-'.join(column)}/{row}"
