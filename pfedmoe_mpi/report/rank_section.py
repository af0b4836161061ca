"""Where the time of one run went, by rank."""

from __future__ import annotations

from typing import Any

import numpy as np

from pfedmoe_mpi.report.drawing import WIDTH, Figure, Paint
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.run_figures import heat_map, legend_above, whole_numbers

HATCHES = ("", "////", "....", "xxxx")  # phases differ without colour too


def seconds(run: Run) -> dict[str, np.ndarray] | None:
    """(ranks, rounds) by phase, NaN where a restart had fewer ranks; None where the rows do not tell."""
    if not all(row.get("seconds_ranks") for row in run.history):
        return None
    spent = [row["seconds_ranks"] for row in run.history]
    ranks = max(len(one["train"]) for one in spent)
    found = {name: np.full((ranks, len(spent)), np.nan) for name in spent[0]}
    for number, one in enumerate(spent):
        for name, values in one.items():
            found[name][: len(values), number] = values
    return found


def figures(run: Run) -> list[Figure]:
    """Nothing for one rank."""
    spent = seconds(run)
    if spent is None or len(spent["train"]) < 2:
        return []
    return [_figure(spent, [row["round"] for row in run.history])]


def _figure(spent: dict[str, np.ndarray], rounds: list[int]) -> Figure:
    ranks = len(spent["train"])

    def draw(canvas: Any, paint: Paint) -> None:
        above, below = canvas.subplots(2, 1, height_ratios=(3, 2))
        bottom = np.zeros(ranks)
        for number, (name, table) in enumerate(spent.items()):
            means = np.nanmean(table, axis=1)
            look: dict[str, Any] = {
                "facecolor": paint.series[number],
                "hatch": HATCHES[number % len(HATCHES)],
            }
            look |= {"edgecolor": paint.ink, "linewidth": 0.5, "label": name, "width": 0.8}
            above.bar(np.arange(ranks), means, bottom=bottom, **look)
            bottom += means
        whole_numbers(above.xaxis)
        above.grid(axis="x", visible=False)
        above.set_xlabel("rank")
        above.set_ylabel("seconds, mean of a round")
        legend_above(canvas, above, 4)
        busy = spent["train"]
        heat_map(canvas, below, busy, "training, s", (0.0, max(1e-9, float(np.nanmax(busy)))))
        ticks = np.unique(np.linspace(0, len(rounds) - 1, min(len(rounds), 8)).astype(int))
        below.set_xticks(ticks, [rounds[tick] for tick in ticks])
        whole_numbers(below.yaxis)
        below.set_xlabel("round")
        below.set_ylabel("rank")

    caption = (
        "Seconds of a mean round on each rank by what they went into; wait is for the other ranks before the "
        "sum. Below: seconds of training of each rank in each round."
    )
    height = 4.2 + min(1.8, 0.05 * ranks)
    return Figure("ranks", "Where the time went by rank", caption, draw, (WIDTH, height))
