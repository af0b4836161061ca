"""Results of `reproduce` by table, beside the published results where a paper has them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pfedmoe_mpi.report.compare import (
    BEFORE_SUM,
    MOMENT_BEFORE_SUM,
    STD_OVER_SEEDS,
    WHEN,
    cohort_accuracy,
    mean_std,
    values_of,
)
from pfedmoe_mpi.report.document import Section
from pfedmoe_mpi.report.labels import changed_during_training, settings_text
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.tables import SPREAD, Cell, Column, Table, spread, word

PUBLISHED = Path(__file__).with_name("paper.toml")
PAPER_COLUMNS = ("paper", "difference, points")
NOT_PUBLISHED: Mapping[str, Any] = {"source": "", "accuracy": "accuracy", "solved": [], "cells": {}}


def sections(runs: Sequence[Run]) -> list[Section]:
    """Return the results of finished runs by table, with those of the paper where `paper.toml` has them."""
    by_table: dict[str, list[Run]] = {}
    for run in runs:
        if run.finished and run.config.get("run.table"):
            by_table.setdefault(str(run.config["run.table"]), []).append(run)
    papers = tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))
    compared = [
        results_and_paper(name, by_table[name], {**NOT_PUBLISHED, **papers[name]})
        for name in sorted(by_table)
        if name in papers
    ]
    unpublished = [results(name, by_table[name]) for name in sorted(by_table) if name not in papers]
    titled = (("Comparison with the paper", compared), ("Results by table", unpublished))
    return [Section(title, tables) for title, tables in titled if tables]


def results(name: str, runs: Sequence[Run]) -> Table:
    """Return a row per cell for a table without published results: `results_and_paper` without the paper."""
    table = results_and_paper(name, runs, NOT_PUBLISHED)
    kept = [n for n, column in enumerate(table.columns) if column.title not in PAPER_COLUMNS]
    columns = [table.columns[n] for n in kept]
    rows = [[row[n] for n in kept] for row in table.rows]
    return Table(f"table_{name}", name, columns, rows, table.notes[:2])


def results_and_paper(name: str, runs: Sequence[Run], paper: Mapping[str, Any]) -> Table:
    """Return a row per cell, in the order of the runs: our result at both moments, the paper's, and
    how far ours after the sum is from it.

    Args:
        paper: a table of `paper.toml`: `cells` by column and row in %, the name of their `accuracy`, the
            `solved` cells.
    """
    cells: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        cells.setdefault((str(run.config.get("run.cell", "")), _changes(run)), []).append(run)
    rows = []
    for (cell, changes), replicates in cells.items():
        column, _, row = cell.rpartition("/")
        percent = paper["cells"].get(column, {}).get(row)
        values = values_of(replicates, lambda run: (run.selected.get(paper["accuracy"]) or {}).get("mean"))
        mean, std = mean_std(values)
        before = values_of(replicates, cohort_accuracy)
        published = None if percent is None else percent / 100
        mark = "*" if cell in paper["solved"] else ""
        rows.append(
            [
                *(word(column), word(row), spread(mean, std, len(values))),
                spread(*mean_std(before), len(before)),
                Cell("–" if published is None else f"{100 * published:.2f}{mark}", (published,)),
                _difference(None if mean is None or published is None else mean - published),
                word(changes),
            ]
        )
    return Table(
        f"paper_{name}", f"{name}: our results and the paper's", _columns(), rows, _notes(paper, runs[0])
    )


def _columns() -> list[Column]:
    columns = [Column("setting", words=True), Column("method", words=True)]
    columns += [Column("ours", SPREAD), Column(BEFORE_SUM, SPREAD)]
    return [*columns, *map(Column, PAPER_COLUMNS), Column("as run", words=True)]


def _difference(value: float | None) -> Cell:
    return Cell("–" if value is None else f"{100 * value:+.2f}".replace("-", "−"), (value,))


def _changes(run: Run) -> str:
    """Return how a run differs from the table's: another number of rounds, other settings."""
    scale = float(run.config.get("run.scale", 1.0))
    changes = []
    if scale != 1:
        kind = "reduced scale" if scale < 1 else "other scale"
        changes.append(f"{kind}: {run.planned} of {round(run.planned / scale)} rounds")
    if run.config.get("run.altered"):
        changes.append(f"changed: {settings_text(run.config, run.config['run.altered'])}")
    during = changed_during_training(run)
    if during:
        changes.append(f"changed during training: {settings_text(during, list(during))}")
    return "; ".join(changes) or "as the table"


def _notes(paper: Mapping[str, Any], run: Run) -> list[str]:
    clients = "clients that never trained" if paper["accuracy"] == "accuracy_unseen" else "all clients"
    notes = [
        f"test accuracy in %, mean over {clients} after the sum, {WHEN[run.select]}; ours: {STD_OVER_SEEDS}",
        MOMENT_BEFORE_SUM,
        *([f"source of the paper's results: {paper['source']}"] if paper["source"] else []),
        "dash: not published, or the method did not converge",
    ]
    return [*notes, "* solved from ranges quoted in the paper's text"] if paper["solved"] else notes
