"""Runs side by side: grouped by configuration, with seeds as the replicates."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pfedmoe_mpi.errors import UserError, nearest
from pfedmoe_mpi.report.labels import counted, labels
from pfedmoe_mpi.report.load import Run

ENOUGH = 5  # seeds, to speak of a difference


class CompareError(UserError):
    """Runs that cannot be compared as asked."""


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in their seed only, by seed."""

    method: str
    setting: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> tuple[Run, ...]:
        """The replicates that tables are made of."""
        return tuple(run for run in self.runs if run.finished)

    @property
    def drawn(self) -> tuple[Run, ...]:
        """The replicates whose curve is drawn: one that has just started would cut that of the finished."""
        return self.finished or self.runs


@dataclass(frozen=True, eq=False)
class Comparison:
    """Groups by setting, in order of its numbers; methods as the runs were named.

    `notes` say what the labels leave out.
    """

    groups: tuple[Group, ...]
    methods: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(group.setting for group in self.groups))

    def of(self, setting: str) -> list[Group]:
        return [group for group in self.groups if group.setting == setting]

    def group(self, method: str, setting: str) -> Group | None:
        return next((g for g in self.groups if (g.method, g.setting) == (method, setting)), None)

    def baseline(self, name: str) -> str | None:
        """The method that a name means; without a name `standalone`, if there is only one of it.

        Raises:
            CompareError: no method of that name, or several.
        """
        wanted = name.replace("-", "_") or "standalone"
        if name in self.methods or wanted in self.methods:
            return name if name in self.methods else wanted
        same = list(dict.fromkeys(g.method for g in self.groups if g.runs[0].algorithm == wanted))
        if len(same) == 1:
            return same[0]
        if not name:
            return None
        known = ", ".join(repr(method) for method in same or self.methods)
        problem = f"there is no method '{name}' among the runs{nearest(name, self.methods)}"
        problem = f"'{name}' means several methods" if same else problem
        raise CompareError(problem, f"--baseline takes one of {known}")


def compare(runs: Sequence[Run]) -> Comparison:
    """Group runs by configuration.

    Raises:
        CompareError: two runs of one configuration and seed.
    """
    by_key: dict[str, list[Run]] = {}
    for run in runs:
        by_key.setdefault(repr(sorted(counted(run).items())), []).append(run)
    groups = [sorted(same, key=lambda run: run.seed) for same in by_key.values()]
    for same in groups:
        for one, other in pairwise(same):
            if one.seed == other.seed:
                problem = f"{one.path} and {other.path} are the same configuration and seed"
                raise CompareError(problem, "name one of them: seeds are the replicates")
    names, notes = labels([same[0] for same in groups])
    found = [Group(*label, tuple(same)) for label, same in zip(names, groups, strict=True)]
    methods = tuple(dict.fromkeys(group.method for group in found))
    found.sort(key=lambda group: (_natural(group.setting), methods.index(group.method)))
    return Comparison(tuple(found), methods, notes)


def _natural(text: str) -> list[tuple[bool, float, str]]:
    """Sorts numbers within words by value."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(bool(n % 2), float(part) if n % 2 else 0.0, part) for n, part in enumerate(parts)]


# Statistics


def mean_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of the sample (n - 1), which one value does not have; exact, so that equal
    values have none.
    """
    if not values:
        return None, None
    return float(statistics.mean(values)), float(statistics.stdev(values)) if len(values) > 1 else None


def known(runs: Iterable[Run], value: Callable[[Run], float | None]) -> list[float]:
    """The values of the runs that have one."""
    return [found for found in map(value, runs) if found is not None]


def accuracy(run: Run, name: str = "mean") -> float | None:
    """Over all clients, with the new shared state, after the last measured round."""
    found = run.last["accuracy"][name]
    return None if found is None else float(found)


def curve(group: Group) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rounds measured by every seed, the mean over seeds, and their standard deviation (0 for one seed)."""
    measured = [
        {row["round"]: row["accuracy"]["mean"] for row in run.history if row["accuracy"]["mean"] is not None}
        for run in group.drawn
    ]
    rounds = sorted(set.intersection(*map(set, measured)))
    table = np.array([[found[number] for number in rounds] for found in measured])
    spread = table.std(axis=0, ddof=1) if len(table) > 1 else np.zeros(len(rounds))
    return np.array(rounds), table.mean(axis=0), spread


@dataclass(frozen=True)
class Paired:
    """A method minus the baseline, seed by seed; `low` and `high` bound the mean's 95 % t interval."""

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        if self.low is None or self.high is None:
            return "too few to tell"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "no difference shown"


def paired(group: Group, base: Group) -> Paired | None:
    """Over the seeds that both have; no interval below ENOUGH seeds, None without a common seed."""
    own, other = ({run.seed: accuracy(run) for run in side.finished} for side in (group, base))
    pairs = {seed: (own[seed], other[seed]) for seed in sorted(own) if seed in other}
    found = {seed: a - b for seed, (a, b) in pairs.items() if a is not None and b is not None}
    if not found:
        return None
    values = tuple(found.values())
    mean, spread = mean_std(values)
    assert mean is not None
    if len(values) < ENOUGH or spread is None:
        return Paired(tuple(found), values, mean, None, None)
    half = t_quantile(len(values) - 1) * spread / math.sqrt(len(values))
    return Paired(tuple(found), values, mean, mean - half, mean + half)


def client_differences(group: Group, base: Group) -> np.ndarray:
    """Each client's difference, mean over the common seeds; NaN where never measured, empty if not paired.

    A client is the same client in both only where it has the same samples.
    """
    others = {run.seed: run for run in base.finished}
    tables = []
    for run in group.finished:
        other = others.get(run.seed)
        if other is None or run.last["clients"]["samples"] != other.last["clients"]["samples"]:
            continue
        own, theirs = (np.array(side.last["clients"]["accuracy"], float) for side in (run, other))
        own[sorted(run.absent(run.last["round"]))] = np.nan
        tables.append(own - theirs)
    if not tables or len({len(table) for table in tables}) > 1:
        return np.empty(0)
    stacked = np.stack(tables)
    measured = ~np.isnan(stacked)
    sums = np.where(measured, stacked, 0).sum(axis=0)
    return np.where(measured.any(axis=0), sums / np.maximum(measured.sum(axis=0), 1), np.nan)


def t_quantile(freedom: int, share: float = 0.95) -> float:
    """The t within whose ± lies `share` of Student's distribution with `freedom` degrees."""
    low, high = 0.0, 1e6
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < share else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| ≤ t); Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2
    term = total = (math.cos(angle) if freedom > 1 else 0.0) if odd else 1.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= square * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def unfinished(comparison: Comparison) -> list[str]:
    """What a reader must know of the runs: which are unfinished, and so left out of tables."""
    found = []
    for group in comparison.groups:
        found += [
            f"left out of the tables, unfinished: {run.path.name}, {run.done} of {run.planned} rounds"
            for run in group.runs
            if not run.finished
        ]
    return found
