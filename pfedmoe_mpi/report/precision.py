"""How well seeds determine the differences from a baseline, and how many seeds would do."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pfedmoe_mpi.report import compare
from pfedmoe_mpi.report.compare import ENOUGH, Paired, t_quantile
from pfedmoe_mpi.report.load import load_run, selection
from pfedmoe_mpi.report.tables import points

MOST = 1_000  # seeds that are worth a number


@dataclass(frozen=True)
class Precision:
    """The width of the widest 95 % interval in points, and the seeds that would make all narrow enough.

    `width` is infinite below ENOUGH seeds. `lines`: one on every difference.
    """

    width: float
    needed: int
    lines: tuple[str, ...]


def precision(folders: Sequence[Path], baseline: str, until: float) -> Precision:
    """Return how well the seeds of finished runs determine every method's difference from the baseline.

    Args:
        until: the width that is narrow enough, in points.

    Raises:
        UserError: a folder is not a run's, or there is no such baseline, or nothing can be paired with it.
    """
    runs = [load_run(folder) for folder in folders]
    runs = [replace(run, select=selection(runs)) for run in runs]
    comparison = compare.compare(runs)
    base = comparison.baseline(baseline)
    pairs = []
    for group in comparison.groups:
        base_group = comparison.group(base, group.setting) if base and group.method != base else None
        paired = compare.paired(group, base_group) if base_group else None
        if paired:
            pairs.append((f"{group.method}, {group.setting}", paired))
    if not pairs:
        problem = "no method can be compared with a baseline on the same seeds and data"
        raise compare.CompareError(problem, "name a method of the table: --baseline NAME")
    widths = [math.inf if paired.low is None else 100 * (_high(paired) - paired.low) for _, paired in pairs]
    needed = [seeds_needed(paired, until) for _, paired in pairs]
    lines = tuple(
        _line(name, base or "", paired, seeds, until)
        for (name, paired), seeds in zip(pairs, needed, strict=True)
    )
    return Precision(max(widths), max(needed), lines)


def seeds_needed(paired: Paired, until: float) -> int:
    """Return how many seeds would make the interval narrower than `until`, if they vary as these do."""
    spread = compare.mean_std(paired.differences)[1]
    if spread is None:
        return ENOUGH

    def narrow(seeds: int) -> bool:
        return 200 * t_quantile(seeds - 1) * spread / math.sqrt(seeds) < until

    return ENOUGH + bisect_left(range(ENOUGH, MOST), True, key=narrow)


def _high(paired: Paired) -> float:
    return math.inf if paired.high is None else paired.high


def _seeds(number: int) -> str:
    return f"{number} seed{'' if number == 1 else 's'}"


def _line(name: str, base: str, paired: Paired, needed: int, until: float) -> str:
    line = f"{name}, minus {base}: {points(paired.mean)} points with {_seeds(len(paired.seeds))}"
    if paired.low is None:
        return f"{line}; no interval below {ENOUGH} seeds"
    line += f", 95 % interval {points(paired.low)} to {points(_high(paired))}"
    if 100 * (_high(paired) - paired.low) < until:
        return line
    return (
        f"{line}; narrower than {until:g} with about {needed if needed < MOST else f'more than {MOST}'} seeds"
    )
