"""Figures that compare several runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pfedmoe_mpi.report import compare
from pfedmoe_mpi.report.compare import Comparison, Group, Paired
from pfedmoe_mpi.report.drawing import WIDTH, Figure, Paint, Style, legend_above, style
from pfedmoe_mpi.report.run_figures import per_cent, rounds_axis

Pair = tuple[Group, Group, Paired]  # a method's group, the baseline's, and their difference


def label(comparison: Comparison, group: Group) -> str:
    """Return the method, with its setting if there are several."""
    return f"{group.method}, {group.setting}" if len(comparison.settings) > 1 else group.method


def pairs(comparison: Comparison, base: str) -> list[Pair]:
    """Return every other group that shares a setting, a seed and its data with the baseline `base`."""
    pairs = []
    for group in comparison.groups:
        other = comparison.group(base, group.setting)
        difference = compare.paired(group, other) if other and group.method != base else None
        if other and difference:
            pairs.append((group, other, difference))
    return pairs


def style_of(comparison: Comparison, method: str, paint: Paint) -> Style:
    """Return a method's style, the same in every figure."""
    return style(comparison.methods.index(method), paint)


def curves(comparison: Comparison, setting: str, number: int) -> Figure:
    """Plot mean accuracy over rounds, with a band of one standard deviation over seeds."""

    def draw(canvas: Any, paint: Paint) -> None:
        axes = canvas.subplots()
        for group in comparison.of(setting):
            rounds, mean, std = compare.curve(group)
            method_style = style_of(comparison, group.method, paint)
            name = f"{group.method} ({len(group.curve_runs)})"
            axes.plot(rounds, per_cent(mean), label=name, **method_style.line(len(rounds)))
            axes.fill_between(
                rounds,
                per_cent(mean - std),
                per_cent(mean + std),
                color=method_style.color,
                alpha=0.18,
                linewidth=0,
            )
        axes.set_ylabel("test accuracy, %")
        rounds_axis(axes)
        legend_above(canvas, axes, _columns(comparison))

    caption = (
        f"{setting}: mean accuracy over all clients. Line: mean over seeds (their number in brackets); "
        "band: one sample standard deviation (divided by n − 1) to either side."
    )
    return Figure(
        _stem("curves", number, comparison), f"Curves, {setting}", caption, draw, _size(comparison, 3.4)
    )


def _columns(comparison: Comparison) -> int:
    """Return how many methods fit side by side in the legend."""
    longest = max(len(method) for method in comparison.methods)
    return max(1, min(5, 84 // (longest + 11)))


def _size(comparison: Comparison, height: float) -> tuple[float, float]:
    """Return the size of a figure of `height` inches with its legend."""
    return WIDTH, height + 0.18 * math.ceil(len(comparison.methods) / _columns(comparison))


def _stem(name: str, number: int, comparison: Comparison) -> str:
    return f"{name}_{number + 1}" if len(comparison.settings) > 1 else name


def client_differences(
    comparison: Comparison, setting: str, pairs: Sequence[Pair], base: str, number: int
) -> Figure:
    """Plot every client's difference from the baseline, sorted."""

    def draw(canvas: Any, paint: Paint) -> None:
        axes = canvas.subplots()
        for group, other, _ in pairs:
            table = compare.client_differences(group, other)
            table = np.sort(table[~np.isnan(table)])
            if len(table):
                x = np.arange(1, len(table) + 1)
                axes.plot(
                    x,
                    per_cent(table),
                    label=group.method,
                    **style_of(comparison, group.method, paint).line(len(x)),
                )
        axes.axhline(0, color=paint.ink, linewidth=1)
        axes.set_xticks([])
        axes.set_xlabel("clients, sorted for each method")
        axes.set_ylabel("difference, points")
        legend_above(canvas, axes, _columns(comparison))

    caption = (
        f"{setting}: each client's accuracy minus that with {base}, mean over the common seeds. "
        "Descriptive, not tested: clients are not replicates."
    )
    stem = _stem("client_differences", number, comparison)
    return Figure(stem, f"Clients: difference from {base}, {setting}", caption, draw, _size(comparison, 3.0))


def intervals(comparison: Comparison, setting: str, pairs: Sequence[Pair], base: str, number: int) -> Figure:
    """Plot each seed's difference from the baseline, the mean, and its interval if there are enough seeds."""

    def draw(canvas: Any, paint: Paint) -> None:
        axes = canvas.subplots()
        for row, (group, _, difference) in enumerate(pairs):
            method_style = style_of(comparison, group.method, paint)
            values = per_cent(difference.differences)
            axes.plot(values, np.full(len(values), row + 0.22), alpha=0.7, **method_style.dots())
            mean = 100 * difference.mean
            axes.plot([mean], [row], color=paint.ink, marker="|", markersize=10, markeredgewidth=2)
            if difference.low is not None and difference.high is not None:
                axes.hlines(row, 100 * difference.low, 100 * difference.high, color=paint.ink, linewidth=2)
        axes.axvline(0, color=paint.ink, linewidth=1)
        labels = [f"{group.method}\n{difference.verdict}" for group, _, difference in pairs]
        axes.set_yticks(range(len(pairs)), labels, fontsize=8)
        axes.set_ylim(len(pairs) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"difference from {base}, points")

    caption = (
        f"{setting}: accuracy minus that of {base} with the same seed. Dots: seeds; stroke: their mean; bar: "
        f"its 95 % t interval over seeds, shown if there are at least {compare.ENOUGH} common seeds."
    )
    stem = _stem("intervals", number, comparison)
    size = (WIDTH, 0.9 + 0.5 * len(pairs))
    return Figure(stem, f"Differences from {base}, {setting}", caption, draw, size)
