"""Streams: what methods know of the new concept, what they lose of the old one, and how long that takes."""

from __future__ import annotations

from pfedmoe_mpi.federation import drift
from pfedmoe_mpi.report import compare
from pfedmoe_mpi.report.compare import STD_OVER_SEEDS, Comparison, Group, mean_std, values_of
from pfedmoe_mpi.report.document import Section
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.tables import (
    SPREAD,
    Cell,
    Column,
    Table,
    amount,
    difference,
    interval,
    number,
    percent,
    spread,
    word,
)


def sections(comparison: Comparison, base: str | None) -> list[Section]:
    """Return a section on the last change of concept, compared with `base`; none if no run had one."""
    groups = [group for group in comparison.groups if values_of(group.finished, _forgetting)]
    columns = [Column("method", words=True), Column("setting", words=True), Column("seeds")]
    columns += [Column("new concept, %", SPREAD)]
    columns += [Column("difference, points"), Column("95 % interval", ("low", "high"))] if base else []
    columns += [Column("old concept, %", SPREAD), Column("forgotten, points", SPREAD)]
    columns += [Column("recovered by"), Column("rounds to recover")]
    notes = [
        "new and old concept: accuracy on its test rows after the last round, mean over clients; other "
        f"tables count the test rows of both; {STD_OVER_SEEDS}",
        "forgotten: best accuracy on the old concept before the last change minus that after the last round",
        "recovered: the new concept is answered as well as the old one in the last measured round before the "
        "new one had half of the stream; rounds from then on, mean over the seeds that did",
    ]
    if base:
        notes.insert(
            1,
            f"difference: on the new concept, from {base} with the same seed and data; 95 % t interval of "
            f"the mean from {compare.ENOUGH} seeds on",
        )
    rows = [_row(comparison, group, base) for group in groups]
    table = Table("drift", "After the last change of concept", columns, rows, notes)
    return [Section("Drift", [table])] if rows else []


def _row(comparison: Comparison, group: Group, base: str | None) -> list[Cell]:
    new, old, lost = (values_of(group.finished, value) for value in (_new, _old, _forgetting))
    rounds = values_of(group.finished, _recovery)
    cells = [word(group.method), word(group.setting), number(len(lost)), spread(*mean_std(new), len(new))]
    if base:
        other = comparison.group(base, group.setting) if group.method != base else None
        pair = compare.paired(group, other, _new) if other else None
        mean, low, high = (pair.mean, pair.low, pair.high) if pair else (None, None, None)
        cells += [difference(mean), interval(low, high)]
    by = Cell(f"{len(rounds)} of {len(lost)}", (len(rounds),))
    cells += [spread(*mean_std(old), len(old)), spread(*mean_std(lost), len(lost))]
    return [*cells, by, amount(mean_std(rounds)[0])]


def facts(run: Run) -> list[tuple[str, str]]:
    """Return the facts of one run's last change of concept; none if it had none."""
    rounds = _recovery(run)
    if not run.last.get("drift"):
        return []
    return [
        ("accuracy on the new concept", percent(_new(run)).text + " %"),
        ("accuracy lost on the old concept", percent(_forgetting(run)).text + " %"),
        ("recovered", "not yet" if rounds is None else f"after {rounds:.0f} rounds"),
    ]


def _new(run: Run) -> float | None:
    return drift.accuracies(run.last)[0] if run.last.get("drift") else None


def _old(run: Run) -> float | None:
    return drift.accuracies(run.last)[1] if run.last.get("drift") else None


def _forgetting(run: Run) -> float | None:
    return _of_last_round(run, "forgetting")


def _recovery(run: Run) -> float | None:
    return _of_last_round(run, "recovery")


def _of_last_round(run: Run, name: str) -> float | None:
    value = (run.last.get("drift") or {}).get(name)
    return None if value is None else float(value)
