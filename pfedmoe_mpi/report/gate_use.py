"""What gates do, in the section about gates: how their weights differ, and the accuracy without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pfedmoe_mpi.report.drawing import WIDTH, Figure, Paint, legend_above, style
from pfedmoe_mpi.report.load import Run, numbers
from pfedmoe_mpi.report.run_figures import rounds_axis
from pfedmoe_mpi.report.tables import Cell, Column, Table, number, word

SPREADS = {"within": "within classes", "classes": "between classes", "clients": "between clients"}
MOST_LINES = 6  # experts whose absence is drawn


def rows_of(run: Run) -> list[Mapping[str, Any]]:
    """Return the rows in which gates were measured; none of runs of an earlier version."""
    return [row for row in run.history if (row.get("gate") or {}).get("load")]


def expert_names(run: Run, experts: int) -> list[str]:
    """Return a name for each expert; pFedMoE's last one is the client's own."""
    own = not all(np.isnan(numbers(row, "alpha")).all() for row in run.history)
    shared = [f"shared {m + 1}" if experts > 2 else "shared" for m in range(experts - 1)]
    return [*shared, "own"] if own else [f"expert {m + 1}" for m in range(experts)]


def tables(run: Run, rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return a table of all experts together, and one of each expert, for some measured rounds."""
    return [_whole_table(rows), _expert_table(run, rows)]


def _whole_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = ["round", "entropy", "accuracy, %", "at mean weights, %"]
    cells = [
        [
            number(row["round"]),
            number(row["gate"]["entropy"], "{:.3f}"),
            _share(row["accuracy"]["mean"]),
            _share(row["gate"]["accuracy"]["constant"]),
        ]
        for row in rows
    ]
    notes = [
        "entropy of the weights, mean over test samples: 0 = one expert alone, 1 = equal weights",
        "at mean weights: the accuracy if every weight of a client is replaced by its mean over the client's "
        "test samples: what the model loses is what it depends on its gate",
    ]
    return Table("gate", "Gates as a whole", list(map(Column, columns)), cells, notes)


def _expert_table(run: Run, rows: Sequence[Mapping[str, Any]]) -> Table:
    heads = (
        "load",
        "first, %",
        *(f"spread {name}" for name in SPREADS.values()),
        "disagreement",
        "without, %",
    )
    columns = [Column("round"), Column("expert", words=True), *map(Column, heads)]
    cells: list[list[Cell]] = []
    for row in rows:
        gate = row["gate"]
        for m, name in enumerate(expert_names(run, len(gate["load"]))):
            shown = [gate["spread"][spread][m] for spread in SPREADS]
            shown.append(gate["disagreement"][m] if gate["disagreement"] else None)
            cells.append(
                [
                    number(row["round"]),
                    word(name),
                    number(gate["load"][m], "{:.3f}"),
                    _share(gate["first"][m]),
                    *(number(value, "{:.3f}") for value in shown),
                    _share(gate["accuracy"]["without"][m]),
                ]
            )
    notes = [
        "load: mean weight; first: test samples whose largest weight it has; spread: population standard "
        "deviation of the weight over the test samples of a class, of the classes' means, of the clients' "
        "means",
        "disagreement: population standard deviation over clients of the weight of the same test row, mean "
        "over rows",
        "without: accuracy if the other experts have its weight",
    ]
    return Table("gate_experts", "Experts under the gates", columns, cells, notes)


def figures(run: Run, rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Plot the accuracy under other weights, and the spread of the first expert's weight, over rounds."""
    names = expert_names(run, len(rows[-1]["gate"]["load"]))[:MOST_LINES]
    accuracy = {
        "gates": [row["accuracy"]["mean"] for row in rows],
        "mean weights": [row["gate"]["accuracy"]["constant"] for row in rows],
    }
    for m, name in enumerate(names):
        accuracy[f"without {name}"] = [row["gate"]["accuracy"]["without"][m] for row in rows]
    per_cent = {
        name: [np.nan if value is None else 100 * value for value in values]
        for name, values in accuracy.items()
    }
    spread = {text: [row["gate"]["spread"][name][0] for row in rows] for name, text in SPREADS.items()}
    rounds = [row["round"] for row in rows]
    return [
        _lines(
            "gates_accuracy",
            "Accuracy with and without the gates",
            "accuracy, %",
            (rounds, per_cent),
            "Accuracy with the gates, with every weight at its mean over a client's test samples, and "
            "without each expert, whose weight the others have.",
        ),
        _lines(
            "gates_spread",
            "Spread of the gate weights",
            f"population std of the weight of {names[0]}",
            (rounds, spread),
            f"How much the weight of {names[0]} differs between the samples of a class, between the classes "
            "of a client and between clients: weights that differ within classes alone route at random.",
        ),
    ]


def _lines(name: str, title: str, axis: str, lines: tuple[list[int], Mapping[str, Any]], text: str) -> Figure:
    """Return a figure of lines over rounds."""

    def draw(canvas: Any, paint: Paint) -> None:
        axes = canvas.subplots()
        rounds, values = lines
        for place, label in enumerate(values):
            axes.plot(rounds, values[label], label=label, **style(place, paint).line(len(rounds)))
        axes.set_ylabel(axis)
        rounds_axis(axes)
        legend_above(canvas, axes, 4)

    return Figure(name, title, text, draw, (WIDTH, 3.4))


def _share(value: float | None) -> Cell:
    """Return a cell in per cent; its value in the CSV file is the share."""
    return Cell("–" if value is None else f"{100 * value:.2f}", (value,))
