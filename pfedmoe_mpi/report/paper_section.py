"""Runs of tables, which `reproduce` trains; those of the papers beside the figures that the papers print."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pfedmoe_mpi.report.compare import known, mean_std
from pfedmoe_mpi.report.document import Section
from pfedmoe_mpi.report.labels import shown
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.tables import SPREAD, Cell, Column, Table, spread, word

FIGURES = Path(__file__).with_name("paper.toml")
THEIRS = ("paper", "difference, points")
NONE: Mapping[str, Any] = {"source": "", "accuracy": "accuracy", "solved": [], "cells": {}}


def sections(runs: Sequence[Run]) -> list[Section]:
    """What finished runs of a table came to: where a paper prints its figures beside them, else alone."""
    of_table: dict[str, list[Run]] = {}
    for run in runs:
        if run.finished and run.config.get("run.table"):
            of_table.setdefault(str(run.config["run.table"]), []).append(run)
    figures = tomllib.loads(FIGURES.read_text(encoding="utf-8"))
    printed = [name for name in sorted(of_table) if name in figures]
    others = [name for name in sorted(of_table) if name not in figures]
    theirs = [beside(name, of_table[name], {**NONE, **figures[name]}) for name in printed]
    own = [alone(name, of_table[name]) for name in others]
    titled = (("Beside the paper", theirs), ("Cells of tables", own))
    return [Section(title, made) for title, made in titled if made]


def alone(name: str, runs: Sequence[Run]) -> Table:
    """`beside` for a table of which no paper prints a figure: without the paper's columns."""
    made = beside(name, runs, NONE)
    ours = [place for place, column in enumerate(made.columns) if column.title not in THEIRS]
    columns = [made.columns[place] for place in ours]
    rows = [[row[place] for place in ours] for row in made.rows]
    return Table(f"table_{name}", name, columns, rows, made.notes[:1])


def beside(name: str, runs: Sequence[Run], paper: Mapping[str, Any]) -> Table:
    """A row per cell that was run, in the order of the runs: ours, the paper's, and the difference.

    Args:
        paper: a table of `paper.toml`: `cells` by column and row in %, which `accuracy` that is, `solved`.
    """
    cells: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        cells.setdefault((str(run.config.get("run.cell", "")), _as_run(run)), []).append(run)
    rows = []
    for (cell, how), same in cells.items():
        column, _, row = cell.rpartition("/")
        figure = paper["cells"].get(column, {}).get(row)
        values = known(same, lambda run: (run.last.get(paper["accuracy"]) or {}).get("mean"))
        mean, std = mean_std(values)
        theirs = None if figure is None else figure / 100
        sign = "*" if cell in paper["solved"] else ""
        rows.append(
            [
                *(word(column), word(row), spread(mean, std, len(values))),
                Cell("–" if theirs is None else f"{100 * theirs:.2f}{sign}", (theirs,)),
                _difference(None if mean is None or theirs is None else mean - theirs),
                word(how),
            ]
        )
    return Table(f"paper_{name}", f"{name}: ours beside the paper's", _columns(), rows, _notes(paper))


def _columns() -> list[Column]:
    columns = [Column("setting", words=True), Column("method", words=True), Column("ours", SPREAD)]
    return [*columns, *map(Column, THEIRS), Column("as run", words=True)]


def _difference(value: float | None) -> Cell:
    return Cell("–" if value is None else f"{100 * value:+.2f}".replace("-", "−"), (value,))


def _as_run(run: Run) -> str:
    """What keeps a run from being that of the table: fewer rounds, other settings."""
    share = float(run.config.get("run.scale", 1.0))
    told = []
    if share != 1:
        kind = "reduced scale" if share < 1 else "other scale"
        told.append(f"{kind}: {run.planned} of {round(run.planned / share)} rounds")
    if run.config.get("run.altered"):
        told.append(f"other {shown(run.config, run.config['run.altered'])}")
    return "; ".join(told) or "as the table"


def _notes(paper: Mapping[str, Any]) -> list[str]:
    which = "clients that never trained" if paper["accuracy"] == "accuracy_unseen" else "all clients"
    notes = [
        f"test accuracy in %, mean over {which}, last round; ours with its standard deviation over seeds",
        *([f"the paper's figures: {paper['source']}"] if paper["source"] else []),
        "a dash: no figure is known, or none converged",
    ]
    return [*notes, "* solved from ranges quoted in the text"] if paper["solved"] else notes
