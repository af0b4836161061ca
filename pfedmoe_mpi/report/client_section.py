"""Accuracy and AUC of every client that the data name, such as a hospital, over seeds."""

from __future__ import annotations

from pfedmoe_mpi.report.compare import WHEN, Comparison, Group, interval, mean_std, values_of
from pfedmoe_mpi.report.document import Section
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.tables import Cell, Column, Table, number, percent, word

MOST = 20  # clients
MEASURES = {"accuracy": "accuracy, %", "auc": "AUC, %"}


def sections(comparison: Comparison) -> list[Section]:
    """Return the section on named clients, if all runs have the same few."""
    runs = [run for group in comparison.groups for run in group.finished]
    names = runs[0].client_names if runs else ()
    if not names or len(names) > MOST or any(run.client_names != names for run in runs):
        return []
    columns = [Column(title, words=True) for title in ("client", "method", "setting")]
    columns.append(Column("seeds"))
    for title in MEASURES.values():
        columns += [Column(title), Column(f"95 % interval of {title}", ("low", "high"))]
    rows = []
    for client, name in enumerate(names):
        for group in comparison.groups:
            cells = [word(name), word(group.method), word(group.setting), number(len(group.finished))]
            for measure in MEASURES:
                cells += _cells(group, client, measure)
            rows.append(cells)
    notes = [
        f"on each client's own test rows, {WHEN[runs[0].select]}; mean over seeds and its 95 % t interval",
        "descriptive: seeds are not paired here",
    ]
    return [Section("Named clients", [Table("named_clients", "Named clients", columns, rows, notes)])]


def _cells(group: Group, client: int, measure: str) -> list[Cell]:
    """Return the mean over seeds and its interval."""

    def value(run: Run) -> float | None:
        column = run.selected["clients"].get(measure)
        return column[client] if column else None

    values = values_of(group.finished, value)
    low, high = interval(values)
    text = "–" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"
    return [percent(mean_std(values)[0]), Cell(text, (low, high))]
