"""Comparison of runs: grouped by configuration, with seeds as the replicates."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pfedmoe_mpi.errors import UserError, nearest
from pfedmoe_mpi.report.labels import grouping_settings, labels
from pfedmoe_mpi.report.load import Run

ENOUGH = 5  # common seeds for an interval and a verdict
SHOWN = 10  # pairs of runs in a note
WHEN = {  # the round of each run whose accuracies are reported, by `Run.select`
    "last": "in the last round",
    "validation": "in the round of each run that is best on validation rows",
    "test": "in the round of each run that is best on these test rows themselves, so they are too high",
}
BEFORE_SUM = "cohort before the sum"
MOMENT_BEFORE_SUM = (  # the other moment is after the sum, with the new shared state
    f"{BEFORE_SUM}: the round's cohort after local training, each member with what it trained itself, which "
    "is when the released code of pFedMoE's authors measures"
)
STD_OVER_CLIENTS = "std over clients: the population's (divided by n)"
STD_OVER_SEEDS = "mean ± sample standard deviation (divided by n − 1) over seeds"


class CompareError(UserError):
    """Runs that cannot be compared."""


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ only in their seed, in order of seeds."""

    method: str
    setting: str
    runs: tuple[Run, ...]

    @property
    def algorithm(self) -> str:
        """The algorithm; of a fork that changed it, a text that names both."""
        return str(grouping_settings(self.runs[0])["algorithm"])

    @property
    def finished(self) -> tuple[Run, ...]:
        """The replicates in the tables."""
        return tuple(run for run in self.runs if run.finished)

    @property
    def curve_runs(self) -> tuple[Run, ...]:
        """The replicates of the curve: the finished ones, else all; unfinished ones would shorten it."""
        return self.finished or self.runs


@dataclass(frozen=True, eq=False)
class Comparison:
    """Groups in order of settings (numbers by value), then of methods; methods in the order of the runs.

    `notes` name the differences between runs that the labels leave out.
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
        """Return the method of this name or algorithm; without a name `standalone`, if there is just one.

        Raises:
            CompareError: there is no method of that name, or several.
        """
        wanted = name.replace("-", "_") or "standalone"
        if name in self.methods or wanted in self.methods:
            return name if name in self.methods else wanted
        variants = list(dict.fromkeys(g.method for g in self.groups if g.algorithm == wanted))
        if len(variants) == 1:
            return variants[0]
        if not name:
            return None
        choices = ", ".join(repr(method) for method in variants or self.methods)
        problem = f"--baseline = {name} is not a method of these runs{nearest(name, self.methods)}"
        problem = f"--baseline = {name} matches several methods" if variants else problem
        raise CompareError(problem, f"set --baseline to one of {choices}")


def compare(runs: Sequence[Run]) -> Comparison:
    """Group runs by configuration.

    Raises:
        CompareError: two runs have the same configuration and seed.
    """
    by_configuration: dict[str, list[Run]] = {}
    for run in runs:
        by_configuration.setdefault(repr(sorted(grouping_settings(run).items())), []).append(run)
    by_seed = [sorted(replicates, key=lambda run: run.seed) for replicates in by_configuration.values()]
    for replicates in by_seed:
        for one, other in pairwise(replicates):
            if one.seed == other.seed:
                problem = f"{one.path} and {other.path} have the same configuration and seed"
                raise CompareError(problem, "name only one of them: replicates differ in their seed")
    names, notes = labels([replicates[0] for replicates in by_seed])
    groups = [Group(*label, tuple(replicates)) for label, replicates in zip(names, by_seed, strict=True)]
    methods = tuple(dict.fromkeys(group.method for group in groups))
    groups.sort(key=lambda group: (_natural(group.setting), methods.index(group.method)))
    return Comparison(tuple(groups), methods, notes)


def _natural(text: str) -> list[tuple[bool, float, str]]:
    """Return a sort key that orders numbers within words by value."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(bool(n % 2), float(part) if n % 2 else 0.0, part) for n, part in enumerate(parts)]


# Statistics


def mean_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean and the sample standard deviation (n - 1), None for a single value.

    Computed exactly, so that equal values have a deviation of 0.
    """
    if not values:
        return None, None
    return float(statistics.mean(values)), float(statistics.stdev(values)) if len(values) > 1 else None


def over_clients(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean and the population's standard deviation (n) of values of all clients, as in metrics."""
    return (float(statistics.mean(values)), float(statistics.pstdev(values))) if values else (None, None)


def values_of(runs: Iterable[Run], value: Callable[[Run], float | None]) -> list[float]:
    """Return the values of the runs that have one."""
    return [number for number in map(value, runs) if number is not None]


def accuracy(run: Run, name: str = "mean") -> float | None:
    """Return the test accuracy over all clients with the new shared state, in the round of `run.select`."""
    share = run.selected["accuracy"][name]
    return None if share is None else float(share)


def cohort_accuracy(run: Run) -> float | None:
    """Return the test accuracy of the cohort before the sum, in the round of `run.select`."""
    share = (run.selected.get("accuracy_cohort") or {}).get("mean")
    return None if share is None else float(share)


def chosen_accuracy(run: Run) -> float | None:
    """Return the test accuracy of the round that validation rows choose, None without validation rows."""
    share = run.chosen["accuracy"]["mean"] if run.chosen else None
    return None if share is None else float(share)


def last_accuracy(run: Run) -> float | None:
    """Return the test accuracy after the last measured round."""
    share = run.last["accuracy"]["mean"]
    return None if share is None else float(share)


def selection_notes(runs: Sequence[Run]) -> list[str]:
    """Return the note on the round whose accuracies are reported, where there is a choice."""
    if not any(run.chosen or run.select != "last" for run in runs):
        return []
    other = {"last": "--select validation reports the round that they choose"}
    why = other.get(runs[0].select, "--select last reports the last round")
    rows = "validation rows choose best.h5; " if any(run.chosen for run in runs) else ""
    return [f"accuracies are on test rows, {WHEN[runs[0].select]}; {rows}{why}"]


def curve(group: Group) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rounds measured by every seed, the mean over seeds, and its deviation (0 for one seed)."""
    measured = [
        {row["round"]: row["accuracy"]["mean"] for row in run.history if row["accuracy"]["mean"] is not None}
        for run in group.curve_runs
    ]
    rounds = sorted(set.intersection(*map(set, measured)))
    table = np.array([[accuracies[number] for number in rounds] for accuracies in measured])
    spread = table.std(axis=0, ddof=1) if len(table) > 1 else np.zeros(len(rounds))
    return np.array(rounds), table.mean(axis=0), spread


@dataclass(frozen=True)
class Paired:
    """Differences of a method from the baseline by seed; `low` to `high`: the mean's 95 % t interval."""

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


def common_seeds(group: Group, base: Group) -> list[tuple[Run, Run]]:
    """Return the finished runs of two groups that have a seed in common, as pairs, in order of seeds."""
    base_runs = {run.seed: run for run in base.finished}
    return [(run, base_runs[run.seed]) for run in group.finished if run.seed in base_runs]


def same_data(run: Run, other: Run) -> bool:
    """Return whether nothing that two runs recorded says that their data or their partitions differ.

    Digests of both decide; without them, in runs of an earlier version, the samples by client and class do.
    """
    if run.digests and other.digests:
        return run.digests == other.digests
    counts, other_counts = run.started_with("class_counts"), other.started_with("class_counts")
    return run.last["clients"]["samples"] == other.last["clients"]["samples"] and (
        counts is None or other_counts is None or counts == other_counts
    )


def paired(group: Group, base: Group, value: Callable[[Run], float | None] = accuracy) -> Paired | None:
    """Pair two groups by seed, where the data are the same, and take the differences of a run's `value`.

    There is no interval below ENOUGH common seeds, and None is returned without a pair.
    """
    differences: dict[int, float] = {}
    for run, base_run in common_seeds(group, base):
        ours, theirs = value(run), value(base_run)
        if ours is not None and theirs is not None and same_data(run, base_run):
            differences[run.seed] = ours - theirs
    if not differences:
        return None
    values = tuple(differences.values())
    return Paired(tuple(differences), values, statistics.mean(values), *interval(values))


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the 95 % t interval of the mean of values over seeds; None for both below ENOUGH seeds."""
    mean, spread = mean_std(values)
    if len(values) < ENOUGH or mean is None or spread is None:
        return None, None
    half = t_quantile(len(values) - 1) * spread / math.sqrt(len(values))
    return mean - half, mean + half


def client_differences(group: Group, base: Group) -> np.ndarray:
    """Return each client's difference in accuracy, (N,), mean over the common seeds.

    NaN for clients that were never measured; empty if nothing can be paired. Two runs are paired only if
    their data are the same.
    """
    tables = []
    for run, base_run in common_seeds(group, base):
        if not same_data(run, base_run):
            continue
        ours, theirs = (np.array(side.selected["clients"]["accuracy"], float) for side in (run, base_run))
        ours[sorted(run.absent_clients(run.selected["round"]))] = np.nan
        tables.append(ours - theirs)
    if not tables or len({len(table) for table in tables}) > 1:
        return np.empty(0)
    stacked = np.stack(tables)
    measured = ~np.isnan(stacked)
    sums = np.where(measured, stacked, 0).sum(axis=0)
    return np.where(measured.any(axis=0), sums / np.maximum(measured.sum(axis=0), 1), np.nan)


def t_quantile(freedom: int, share: float = 0.95) -> float:
    """Return the t such that P(|T| ≤ t) = `share` for Student's T with `freedom` degrees of freedom."""
    low, high = 0.0, 1e6
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < share else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """Return P(|T| ≤ t); Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2
    term = total = (math.cos(angle) if freedom > 1 else 0.0) if odd else 1.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= square * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def pairing_notes(comparison: Comparison, base: str | None) -> list[str]:
    """Return notes on the runs that are not paired with the baseline's, and on those without digests."""
    different, unknown = [], []
    for group in comparison.groups:
        base_group = comparison.group(base, group.setting) if base and group.method != base else None
        for run, base_run in common_seeds(group, base_group) if base_group else ():
            pair = f"{run.path.name} and {base_run.path.name}"
            if not same_data(run, base_run):
                different.append(pair)
            elif not (run.digests and base_run.digests):
                unknown.append(pair)
    notes = {
        "not paired, because their data or partitions differ": different,
        "paired by seed alone, because an earlier version did not record their data": unknown,
    }
    return [f"{what}: {'; '.join(pairs[:SHOWN])}{_more(pairs)}" for what, pairs in notes.items() if pairs]


def _more(pairs: Sequence[str]) -> str:
    return f"; and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""


def unfinished(comparison: Comparison) -> list[str]:
    """Return a note for every unfinished run: it is left out of the tables."""
    notes = []
    for group in comparison.groups:
        notes += [
            f"left out of the tables, unfinished: {run.path.name}, {run.done} of {run.planned} rounds"
            for run in group.runs
            if not run.finished
        ]
    return notes
