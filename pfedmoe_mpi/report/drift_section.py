"""Streams: what methods lose of the old concept, and how long they take to learn the new one."""

from __future__ import annotations

from pfedmoe_mpi.report.compare import STD_OVER_SEEDS, Comparison, mean_std, values_of
from pfedmoe_mpi.report.document import Section
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.tables import SPREAD, Cell, Column, Table, amount, number, spread, word


def sections(comparison: Comparison) -> list[Section]:
    """Return a section on the last change of concept; none if no run had one."""
    columns = [Column("method", words=True), Column("setting", words=True), Column("seeds")]
    columns += [Column("forgotten, points", SPREAD), Column("recovered by"), Column("rounds to recover")]
    rows = []
    for group in comparison.groups:
        lost = values_of(group.finished, _forgetting)
        if lost:
            rounds = values_of(group.finished, _recovery)
            by = Cell(f"{len(rounds)} of {len(lost)}", (len(rounds),))
            cells = [number(len(lost)), spread(*mean_std(lost), len(lost)), by, amount(mean_std(rounds)[0])]
            rows.append([word(group.method), word(group.setting), *cells])
    notes = [
        "forgotten: best accuracy on the old concept before the last change minus that after the last round, "
        f"mean over clients; {STD_OVER_SEEDS}",
        "recovered: the new concept is answered as well as the old one right before the change; rounds: mean "
        "over the seeds that did",
    ]
    table = Table("drift", "Forgetting and recovery", columns, rows, notes)
    return [Section("Drift", [table])] if rows else []


def _forgetting(run: Run) -> float | None:
    return _of_last_round(run, "forgetting")


def _recovery(run: Run) -> float | None:
    return _of_last_round(run, "recovery")


def _of_last_round(run: Run, name: str) -> float | None:
    value = (run.last.get("drift") or {}).get(name)
    return None if value is None else float(value)
