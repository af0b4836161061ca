"""The figures of several runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pfedmoe_mpi.report import compare
from pfedmoe_mpi.report.compare import Comparison, Group, Paired
from pfedmoe_mpi.report.drawing import WIDTH, Figure, Paint, Style, style
from pfedmoe_mpi.report.run_figures import legend_above, per_cent, rounds_axis

Pair = tuple[Group, Group, Paired]  # a method's group, the baseline's, and their difference


def label(comparison: Comparison, group: Group) -> str:
    """The method, with its setting where there are several."""
    return f"{group.method}, {group.setting}" if len(comparison.settings) > 1 else group.method


def pairs(comparison: Comparison, base: str) -> list[Pair]:
    """Every other group that shares a setting and a seed with the baseline."""
    found = []
    for group in comparison.groups:
        other = comparison.group(base, group.setting)
        difference = compare.paired(group, other) if other and group.method != base else None
        if other and difference:
            found.append((group, other, difference))
    return found


def look(comparison: Comparison, method: str, paint: Paint) -> Style:
    """A method looks the same in every figure."""
    return style(comparison.methods.index(method), paint)


def curves(comparison: Comparison, setting: str, number: int) -> Figure:
    """Mean accuracy over rounds, with one standard deviation over seeds to either side."""

    def draw(canvas: Any, paint: Paint) -> None:
        axes = canvas.subplots()
        for group in comparison.of(setting):
            rounds, mean, std = compare.curve(group)
            own = look(comparison, group.method, paint)
            name = f"{group.method} ({len(group.drawn)})"
            axes.plot(rounds, per_cent(mean), label=name, **own.line(len(rounds)))
            axes.fill_between(
                rounds, per_cent(mean - std), per_cent(mean + std), color=own.color, alpha=0.18, linewidth=0
            )
        axes.set_ylabel("test accuracy, %")
        rounds_axis(axes)
        legend_above(canvas, axes, _columns(comparison))

    caption = (
        f"{setting}: mean accuracy over all clients; line: mean over seeds (how many in brackets), "
        "band: one standard deviation over seeds."
    )
    return Figure(
        _stem("curves", number, comparison), f"Curves, {setting}", caption, draw, _size(comparison, 3.4)
    )


def _columns(comparison: Comparison) -> int:
    """How many names fit beside each other above a figure."""
    longest = max(len(method) for method in comparison.methods)
    return max(1, min(5, 84 // (longest + 11)))


def _size(comparison: Comparison, height: float) -> tuple[float, float]:
    """A figure of `height` inches and its legend."""
    return WIDTH, height + 0.18 * math.ceil(len(comparison.methods) / _columns(comparison))


def _stem(name: str, number: int, comparison: Comparison) -> str:
    return f"{name}_{number + 1}" if len(comparison.settings) > 1 else name


def by_client(comparison: Comparison, setting: str, found: Sequence[Pair], base: str, number: int) -> Figure:
    """Every client's difference from the baseline, sorted."""

    def draw(canvas: Any, paint: Paint) -> None:
        axes = canvas.subplots()
        for group, other, _ in found:
            table = compare.client_differences(group, other)
            table = np.sort(table[~np.isnan(table)])
            if len(table):
                x = np.arange(1, len(table) + 1)
                axes.plot(
                    x,
                    per_cent(table),
                    label=group.method,
                    **look(comparison, group.method, paint).line(len(x)),
                )
        axes.axhline(0, color=paint.ink, linewidth=1)
        axes.set_xticks([])
        axes.set_xlabel("clients, sorted for each method")
        axes.set_ylabel(f"points over {base}")
        legend_above(canvas, axes, _columns(comparison))

    caption = (
        f"{setting}: each client's accuracy minus that with {base}, mean over the common seeds. "
        "Shown, not tested: clients are no replicates."
    )
    stem = _stem("client_differences", number, comparison)
    return Figure(stem, f"Clients against {base}, {setting}", caption, draw, _size(comparison, 3.0))


def intervals(comparison: Comparison, setting: str, found: Sequence[Pair], base: str, number: int) -> Figure:
    """A dot per seed; the mean with its interval where there are seeds enough."""

    def draw(canvas: Any, paint: Paint) -> None:
        axes = canvas.subplots()
        for place, (group, _, difference) in enumerate(found):
            own = look(comparison, group.method, paint)
            values = per_cent(difference.differences)
            axes.plot(values, np.full(len(values), place + 0.22), alpha=0.7, **own.dots())
            mean = 100 * difference.mean
            axes.plot([mean], [place], color=paint.ink, marker="|", markersize=10, markeredgewidth=2)
            if difference.low is not None and difference.high is not None:
                axes.hlines(place, 100 * difference.low, 100 * difference.high, color=paint.ink, linewidth=2)
        axes.axvline(0, color=paint.ink, linewidth=1)
        words = [f"{group.method}\n{difference.verdict}" for group, _, difference in found]
        axes.set_yticks(range(len(found)), words, fontsize=8)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"accuracy over {base}, points")

    caption = (
        f"{setting}: paired differences from {base}: a dot per seed, the mean as a stroke, its 95 % t "
        f"interval over seeds as a bar where there are {compare.ENOUGH} seeds or more."
    )
    stem = _stem("intervals", number, comparison)
    size = (WIDTH, 0.9 + 0.5 * len(found))
    return Figure(stem, f"Differences from {base}, {setting}", caption, draw, size)
