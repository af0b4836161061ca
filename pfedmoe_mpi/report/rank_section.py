"""Time of one run by rank."""

from __future__ import annotations

from typing import Any

import numpy as np

from pfedmoe_mpi.report.drawing import WIDTH, Figure, Paint
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.run_figures import heat_map, legend_above, whole_numbers

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
        above, below = canvas.subplots(2, 1, height_ratios=(3, 2))
        bottom = np.zeros(ranks)
        for number, (name, table) in enumerate(tables.items()):
            means = np.nanmean(table, axis=1)
            bar_style: dict[str, Any] = {
                "facecolor": paint.series[number],
                "hatch": HATCHES[number % len(HATCHES)],
            }
            bar_style |= {"edgecolor": paint.ink, "linewidth": 0.5, "label": name, "width": 0.8}
            above.bar(np.arange(ranks), means, bottom=bottom, **bar_style)
            bottom += means
        whole_numbers(above.xaxis)
        above.grid(axis="x", visible=False)
        above.set_xlabel("rank")
        above.set_ylabel("mean seconds per round")
        legend_above(canvas, above, 4)
        training = tables["train"]
        heat_map(canvas, below, training, "training, s", (0.0, max(1e-9, float(np.nanmax(training)))))
        ticks = np.unique(np.linspace(0, len(rounds) - 1, min(len(rounds), 8)).astype(int))
        below.set_xticks(ticks, [rounds[tick] for tick in ticks])
        whole_numbers(below.yaxis)
        below.set_xlabel("round")
        below.set_ylabel("rank")

    caption = (
        "Above: mean seconds per round on each rank, by phase; wait: for the other ranks, before the sum. "
        "Below: seconds of training on each rank in each round."
    )
    height = 4.2 + min(1.8, 0.05 * ranks)
    return Figure("ranks", "Time by rank", caption, draw, (WIDTH, height))
