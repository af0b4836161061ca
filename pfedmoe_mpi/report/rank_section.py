"""Time of one run by rank."""

from __future__ import annotations

from typing import Any

import numpy as np

from pfedmoe_mpi.report.drawing import WIDTH, Figure, Paint, legend_above, panels
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.run_figures import heat_map, round_columns, whole_numbers

HATCHES = ("", "////", "....", "xxxx")  # distinguish phases without colour


def seconds(run: Run) -> dict[str, np.ndarray] | None:
    """Return seconds, (ranks, rounds), by phase; NaN if a restart had fewer ranks, None if not recorded."""
    if not all(row.get("seconds_ranks") for row in run.history):
        return None
    rows = [row["seconds_ranks"] for row in run.history]
    ranks = max(len(row["train"]) for row in rows)
    tables = {name: np.full((ranks, len(rows)), np.nan) for name in rows[0]}
    for number, row in enumerate(rows):
        for name, values in row.items():
            tables[name][: len(values), number] = values
    return tables


def figures(run: Run) -> list[Figure]:
    """Return the figure of time by rank, nothing for one rank."""
    tables = seconds(run)
    if tables is None or len(tables["train"]) < 2:
        return []
    return [_figure(tables, [row["round"] for row in run.history])]


def _figure(tables: dict[str, np.ndarray], rounds: list[int]) -> Figure:
    ranks = len(tables["train"])

    def draw(canvas: Any, paint: Paint) -> None:
        left, right = panels(canvas, (3, 2), sharey=True)
        start = np.zeros(ranks)
        for number, (name, table) in enumerate(tables.items()):
            means = np.nanmean(table, axis=1)
            bar_style: dict[str, Any] = {
                "facecolor": paint.series[number],
                "hatch": HATCHES[number % len(HATCHES)],
            }
            bar_style |= {"edgecolor": paint.ink, "linewidth": 0.5, "label": name, "height": 0.8}
            left.barh(np.arange(ranks), means, left=start, **bar_style)
            start += means
        left.grid(axis="y", visible=False)
        left.set_xlabel("mean seconds per round")
        legend_above(canvas, left, 4)
        training = tables["train"]
        heat_map(canvas, right, training, "training, s", (0.0, max(1e-9, float(np.nanmax(training)))))
        round_columns(right, rounds, 5)
        for axes in (left, right):
            whole_numbers(axes.yaxis)
        left.set_ylabel("rank")

    caption = (
        "Mean seconds per round on each rank, by phase; wait: for the other ranks, before the sum. Colours: "
        "seconds of training on each rank in each round."
    )
    height = 2.2 + min(3.0, 0.08 * ranks)
    return Figure("ranks", "Time by rank", caption, draw, (WIDTH, height), panels=2)
