"""Differential privacy: ε of a run, accuracy against ε, and what each method loses to the noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pfedmoe_mpi.report import compare
from pfedmoe_mpi.report.compare import Comparison, Group, accuracy, mean_std, values_of
from pfedmoe_mpi.report.document import Section
from pfedmoe_mpi.report.drawing import WIDTH, Figure, Paint, legend_above, style
from pfedmoe_mpi.report.labels import grouping_settings, labels, training_changes
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.run_figures import per_cent
from pfedmoe_mpi.report.tables import (
    SPREAD,
    Cell,
    Column,
    Table,
    amount,
    difference,
    interval,
    number,
    short,
    spread,
    word,
)

TICKS = 8  # values of ε named below a figure
NONE, INFINITE = "none", "infinite"


@dataclass(frozen=True, eq=False)
class Point:
    """Runs of one method under one protection.

    Attributes:
        unit: what is protected, empty without differential privacy.
        epsilon: the largest ε of the seeds, of what is sent; infinite without noise.
        private: that of a client's whole model; None where it has no account of its own.
    """

    group: Group
    unit: str
    epsilon: float
    private: float | None

    @property
    def accuracies(self) -> list[float]:
        return values_of(self.group.finished, accuracy)


Lines = Mapping[tuple[str, str], Sequence[Point]]  # by (method, setting), in order of ε


def facts(run: Run) -> list[tuple[str, str]]:
    """Return the facts on one run's differential privacy, none without it."""
    entry: Mapping[str, Any] = run.history[-1].get("privacy") or {}
    if not entry:
        return []
    unit, at = entry["unit"], f"at δ = {entry['delta']:g}"
    if not entry["noise"]:
        return [(f"ε of a {unit}", "none: clips, without noise")]
    epsilon = INFINITE if entry["epsilon"] is None else f"{entry['epsilon']:.3g}"
    found = [("noise, in multiples of the clip", f"{entry['noise']:.4g}")]
    if unit == "client":
        return [(f"ε of a client {at}", epsilon), *found]
    found.insert(0, (f"ε of a sample {at}, of what a client sends", epsilon))
    if (private := _private(run)) is not None:
        found.insert(1, (f"ε of a sample {at}, of a client's whole model", f"{private:.3g}"))
    return found


def sections(comparison: Comparison) -> list[Section]:
    """Return a section on accuracy against ε; none if no run had differential privacy."""
    lines = _lines(comparison)
    units = list(dict.fromkeys(point.unit for line in lines.values() for point in line if point.unit))
    if not units:
        return []
    return [Section("Privacy", [_table(lines)], [_figure(lines, unit) for unit in units])]


def _lines(comparison: Comparison) -> Lines:
    """Return the methods of which a run had differential privacy, named without the settings of privacy."""
    groups = [group for group in comparison.groups if values_of(group.finished, accuracy)]
    plain = [_without_privacy(group.runs[0]) for group in groups]
    keys = [repr(sorted(grouping_settings(run).items())) for run in plain]
    firsts = dict(zip(keys, plain, strict=True))
    names = dict(zip(firsts, labels(list(firsts.values()))[0], strict=True)) if firsts else {}
    lines: dict[tuple[str, str], list[Point]] = {}
    for key, group in zip(keys, groups, strict=True):
        lines.setdefault(names[key], []).append(_point(group))
    return {
        name: sorted(line, key=lambda point: (not point.unit, point.unit, point.epsilon))
        for name, line in lines.items()
        if any(point.unit for point in line)
    }


def _without_privacy(run: Run) -> Run:
    """Return the run without its settings of privacy, but those that changed while it trained."""
    changed = {name for _, name, *_ in training_changes(run)}
    settings = grouping_settings(run).items()
    kept = {name: value for name, value in settings if name in changed or not name.startswith("privacy.")}
    return replace(run, config=kept, events=(), trunk=None)


def _point(group: Group) -> Point:
    entries: list[Mapping[str, Any]] = [run.history[-1].get("privacy") or {} for run in group.finished]
    found = [math.inf if entry.get("epsilon") is None else float(entry["epsilon"]) for entry in entries]
    private = values_of(group.finished, _private)
    return Point(group, entries[0].get("unit", ""), max(found), max(private, default=None))


def _private(run: Run) -> float | None:
    value = (run.history[-1].get("privacy") or {}).get("epsilon_private")
    return None if value is None else float(value)


def _sent(run: Run) -> float | None:
    """Return what a member sends in a round, in kB."""
    return mean_std([row["bytes"]["up"] / 1000 for row in run.history if row["bytes"]["up"] is not None])[0]


def _table(lines: Lines) -> Table:
    columns = [Column("method", words=True), Column("setting", words=True), Column("protects", words=True)]
    columns += [Column("ε"), Column("ε of the whole model"), Column("clip"), Column("seeds")]
    columns += [Column("accuracy, %", SPREAD), Column("difference from none, points")]
    columns += [Column("95 % interval", ("low", "high")), Column("kB up")]
    rows = [_row(*name, point, _bare(line)) for name, line in lines.items() for point in line]
    deltas = {
        f"{entry['delta']:g}": None
        for line in lines.values()
        for point in line
        for run in point.group.finished
        if (entry := run.history[-1].get("privacy") or {}).get("epsilon") is not None
    }
    notes = [
        f"ε: of what is sent in all rounds, at δ = {' or '.join(deltas)}, the largest of the seeds; {NONE}: "
        f"without differential privacy; {INFINITE}: a clip without noise",
        f"accuracy: mean over all clients; {compare.STD_OVER_SEEDS}",
        f"difference from none: paired by seed; interval: of its mean, from {compare.ENOUGH} seeds on",
        "kB up: what a member sends in a round, mean over rounds",
    ]
    return Table("epsilon", "Accuracy against ε", columns, rows, notes)


def _bare(line: Sequence[Point]) -> Point | None:
    """Return the point without differential privacy."""
    return next((point for point in line if not point.unit), None)


def _row(method: str, setting: str, point: Point, bare: Point | None) -> list[Cell]:
    values = point.accuracies
    pair = compare.paired(point.group, bare.group) if bare and point.unit else None
    epsilon = short(point.epsilon) if math.isfinite(point.epsilon) else INFINITE if point.unit else NONE
    clip = point.group.runs[0].config.get("privacy.clip") if point.unit else None
    return [
        *(word(method), word(setting), word(point.unit or NONE)),
        Cell(epsilon, (point.epsilon if math.isfinite(point.epsilon) else epsilon,)),
        *(amount(point.private), amount(clip), number(len(values))),
        *(spread(*mean_std(values), len(values)), difference(pair.mean if pair else None)),
        interval(pair.low if pair else None, pair.high if pair else None),
        amount(mean_std(values_of(point.group.finished, _sent))[0]),
    ]


def _figure(lines: Lines, unit: str) -> Figure:
    """Plot accuracy against ε for one unit: a line for each method, which ends in its runs without noise."""
    drawn = {
        name: [p for p in line if not p.unit or (p.unit == unit and 0 < p.epsilon < math.inf)]
        for name, line in lines.items()
        if any(p.unit == unit for p in line)
    }
    finite = sorted({p.epsilon for line in drawn.values() for p in line if p.unit})
    end = 2 * finite[-1] if finite else 1.0

    def draw(canvas: Any, paint: Paint) -> None:
        axes = canvas.subplots()
        for index, ((method, setting), line) in enumerate(drawn.items()):
            own = style(index, paint)
            beside = 1.03 ** (index - (len(drawn) - 1) / 2)  # so that equal ε do not hide each other
            places = [beside * min(point.epsilon, end) for point in line]
            name = f"{method}, {setting}" if len({each[1] for each in drawn}) > 1 else method
            means = [mean_std(point.accuracies)[0] or 0.0 for point in line]
            axes.plot(places, per_cent(means), label=name, **own.line(1))
            for place, point in zip(places, line, strict=True):
                values = point.accuracies
                dots = {**own.dots(), "markersize": 3, "alpha": 0.5}
                axes.plot([place] * len(values), per_cent(values), **dots)
                low, high = compare.interval(values)
                if low is not None and high is not None:
                    axes.vlines(place, 100 * low, 100 * high, color=own.color, linewidth=1.5)
        axes.set_xscale("log")
        named = sorted({float(f"{epsilon:.2g}") for epsilon in finite})
        named = named[:: math.ceil(len(named) / TICKS) or 1]
        axes.set_xticks([*named, end], [*map(short, named), NONE])
        axes.minorticks_off()
        axes.set_xlabel(f"ε of one {unit}")
        axes.set_ylabel("test accuracy, %")
        legend_above(canvas, axes)

    caption = (
        f"Accuracy of all clients against ε of one {unit}, from strong protection to none. Line: mean over "
        f"seeds; dots: seeds; bar: 95 % t interval of the mean, shown from {compare.ENOUGH} seeds on."
    )
    return Figure(f"epsilon_{unit}", f"Accuracy against ε of one {unit}", caption, draw, (WIDTH, 3.4))
