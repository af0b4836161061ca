"""The section of one run's page about gates: weights by client and class, and what they do for accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np

from pfedmoe_mpi.report import distributions, gate_use
from pfedmoe_mpi.report.compare import STD_OVER_CLIENTS, over_clients
from pfedmoe_mpi.report.document import Section
from pfedmoe_mpi.report.drawing import WIDTH, Figure, Paint, legend_above, style
from pfedmoe_mpi.report.load import Run, numbers
from pfedmoe_mpi.report.names import NO_NAMES, Names
from pfedmoe_mpi.report.run_figures import (
    band,
    client_ticks,
    column,
    heat_map,
    round_columns,
    rounds_axis,
    short_name,
)
from pfedmoe_mpi.report.tables import Column, Table, number, word

FEW = 12  # classes that are drawn as lines; more are drawn as a heat map


def section(run: Run) -> Section:
    """Return tables and figures of gate weights, an empty section for methods without a gate."""
    tables: list[Table] = []
    figures: list[Figure] = []
    if not all(np.isnan(numbers(row, "alpha")).all() for row in run.history):
        tables.append(_client_table(run))
        figures.append(client_figure(run))
    rounds, table = by_class(run)
    if len(rounds):
        tables.append(_class_table(rounds, table, run.names))
        figures.append(class_figure(rounds, table, run.names))
    used = gate_use.rows_of(run)
    if used:
        tables += gate_use.tables(run, [used[n] for n in first_middle_last(len(used))])
        figures += gate_use.figures(run, used)
    return Section("Gates", tables, figures)


def by_class(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return the m recorded rounds, (m,), and the mean α by class, (m, classes), NaN without samples."""
    rows = [row for row in run.history if row.get("alpha_class")]
    return np.array([row["round"] for row in rows]), np.array([row["alpha_class"] for row in rows], float)


def first_middle_last(number: int) -> list[int]:
    """Return the first, middle and last index of `number` rows."""
    return [0, number // 2, number - 1] if number > 2 else list(range(number))


def _client_table(run: Run) -> Table:
    """Summarise α over the clients that have trained, in the first, middle and last measured round."""
    table = column(run, "alpha")
    measured = np.flatnonzero(~np.isnan(table).all(axis=1))
    columns = [Column("round"), *map(Column, ("mean α", "std over clients", "lowest", "highest"))]
    rows = []
    for n in first_middle_last(len(measured)):
        row = measured[n]
        values = table[row][~np.isnan(table[row])].tolist()
        mean, std = over_clients(values)
        cells = (number(value, "{:.3f}") for value in (mean, std, min(values), max(values)))
        rows.append([number(run.history[row]["round"]), *cells])
    title = "Weight α of the shared expert, mean over a client's test samples"
    return Table("alpha", title, columns, rows, [STD_OVER_CLIENTS])


def _class_table(rounds: np.ndarray, table: np.ndarray, names: Names) -> Table:
    columns = [Column("class"), *([Column("name", words=True)] if names.classes else [])]
    columns += [*(Column(f"round {rounds[n]}") for n in first_middle_last(len(rounds)))]
    rows = [
        [
            number(label),
            *([word(names.classes[label])] if names.classes else []),
            *(
                number(None if np.isnan(table[n, label]) else float(table[n, label]), "{:.3f}")
                for n in first_middle_last(len(rounds))
            ),
        ]
        for label in range(table.shape[1])
    ]
    notes = ["mean over the test samples of a class, over all clients that have trained"]
    title = "Weight α of the shared expert by class"
    return Table("alpha_class", title, columns, rows, notes, open=len(rows) <= FEW)


def client_figure(run: Run) -> Figure:
    """Plot α of the shared expert over rounds: of every client, or its distribution over many clients."""
    many = run.clients > distributions.MANY

    def draw(canvas: Any, paint: Paint) -> None:
        above, below = canvas.subplots(2, 1, height_ratios=(2, 3), sharex=True)
        table = column(run, "alpha")
        rounds = np.array([row["round"] for row in run.history])
        measured = ~np.isnan(table).all(axis=1)
        rounds, table = rounds[measured], table[measured]
        x = np.arange(len(rounds))  # the columns of the heat map
        look = style(0, paint)
        low, high = band(table)
        above.fill_between(
            x, low, high, color=look.color, alpha=0.2, linewidth=0, label="80 % of the clients"
        )
        above.plot(x, np.nanmean(table, axis=1), label="mean over clients", **look.line(len(x)))
        above.set_ylim(0, 1)
        above.set_ylabel("α of the shared expert")
        legend_above(canvas, above, 2)
        if many:
            shares = distributions.shares(table)
            heat_map(canvas, below, shares, "share of the clients, %", (0, float(shares.max())))
            ends = (0.5 * distributions.BINS - 0.5, distributions.BINS - 0.5)
            below.set_yticks([-0.5, *ends], ["0", "0.5", "1"])
            below.set_ylim(-0.5, ends[1])
            below.set_ylabel("mean α of a client")
        else:
            heat_map(canvas, below, table.T, "mean α", (0, 1))
            client_ticks(canvas, below.yaxis, run.client_labels)
            below.set_ylabel("client")
        round_columns(below, rounds.tolist())

    caption = (
        "Mean weight α of the shared expert over a client's test samples: 1 = shared expert only, "
        "0 = local expert only. Above: mean and 10th to 90th percentile of the clients; below: "
        + ("the share of the clients with such a mean." if many else "every client.")
    )
    height = 5.0 if many else 5.0 + min(2.0, 0.08 * max(0, run.clients - 16))
    return Figure("gates", "Gate weights by client", caption, draw, (WIDTH, height))


def class_figure(rounds: np.ndarray, table: np.ndarray, names: Names = NO_NAMES) -> Figure:
    """Plot α by class over rounds: lines for few classes, a heat map for many."""
    few = table.shape[1] <= FEW

    def draw(canvas: Any, paint: Paint) -> None:
        axes = canvas.subplots()
        if few:
            for label in range(table.shape[1]):
                line_style = style(label, paint)
                axes.plot(
                    rounds,
                    table[:, label],
                    label=short_name(names.class_of(label)),
                    **line_style.line(len(rounds)),
                )
            axes.set_ylabel("α of the shared expert")
            rounds_axis(axes)
            legend_above(canvas, axes, 5)
            return
        heat_map(canvas, axes, table.T, "mean α", (float(np.nanmin(table)), float(np.nanmax(table))))
        round_columns(axes, rounds.tolist())
        if names.classes:
            client_ticks(canvas, axes.yaxis, names.classes)
        axes.set_ylabel("class")

    caption = (
        "Mean weight α of the shared expert by class of the test samples, all clients that have trained: "
        "1 = shared expert only, 0 = local expert only. The axis covers the range of the values."
    )
    size = (WIDTH, 3.4 if few else min(6.0, max(3.0, 0.05 * table.shape[1] + 1.0)))
    return Figure("gates_class", "Gate weights by class", caption, draw, size)
