"""A run and its fork: the same federation from one round on, paired client by client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pfedmoe_mpi.report.document import Section
from pfedmoe_mpi.report.drawing import WIDTH, Figure, Paint, legend_above, style
from pfedmoe_mpi.report.labels import training_changes
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.periods import forked_after, is_trunk
from pfedmoe_mpi.report.run_figures import per_cent, rounds_axis
from pfedmoe_mpi.report.tables import (
    Column,
    Table,
    client_cells,
    client_columns,
    difference,
    number,
    percent,
    word,
)

Pair = tuple[Run, Run, int]  # a run, its fork, and the last round that they have in common


def pairs(runs: Sequence[Run]) -> list[Pair]:
    """Return every fork among the runs together with the run that it branched off, wherever that lies now."""
    found = []
    for branch in runs:
        at = forked_after(branch)
        if at is not None and branch.done > at:
            found += [(run, branch, at) for run in runs if run.done > at and is_trunk(run, branch, at)]
    return found


def differences(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Return the rounds (R,) from the fork on that both measured, and the fork's accuracy minus the run's.

    The latter is (R, N) by client, NaN where a client was not measured or has not trained.
    """
    run, branch, at = pair
    measured = _measured(run), _measured(branch)
    rounds = [n for n in sorted(measured[0].keys() & measured[1].keys()) if n >= at]
    table = np.array([np.array(measured[1][n], float) - np.array(measured[0][n], float) for n in rounds])
    for row, n in zip(table, rounds, strict=True):
        row[sorted(run.absent_clients(n))] = np.nan
    return np.array(rounds), table.reshape(len(rounds), -1)


def _measured(run: Run) -> dict[int, Sequence[float | None]]:
    """Return the clients' accuracy by round, of the measured ones."""
    rows = [row for row in run.history if row["accuracy"]["mean"] is not None]
    return {row["round"]: row["clients"]["accuracy"] for row in rows}


def sections(runs: Sequence[Run]) -> list[Section]:
    """Return a section on the forks among the runs, none without one."""
    found = [pair for pair in pairs(runs) if len(differences(pair)[0])]
    if not found:
        return []
    figures = [_figure(pair, n if len(found) > 1 else 0) for n, pair in enumerate(found, 1)]
    return [Section("Forks", [_table(found), _clients(found)], figures)]


def _table(found: Sequence[Pair]) -> Table:
    columns = [Column(title, words=True) for title in ("fork", "of run", "changed settings")]
    titles = ("fork after round", "round", "mean, points", "median, points", "better", "equal", "worse")
    rows = []
    for run, branch, at in found:
        rounds, table = differences((run, branch, at))
        last = table[-1][~np.isnan(table[-1])]
        summary = [(float(of(last)) if len(last) else None) for of in (np.mean, np.median)]
        rows.append(
            [
                *(word(branch.path.name), word(run.path.name), word(_changed(run, branch, at))),
                *(number(at), number(int(rounds[-1])), *map(difference, summary)),
                *(number(int(count)) for count in ((last > 0).sum(), (last == 0).sum(), (last < 0).sum())),
            ]
        )
    notes = [
        "each client's accuracy in the fork minus that in the run, in the last round that both measured",
        "run and fork share every random number; one pair is one seed, so this is not a test",
    ]
    return Table("forks", "Forks, client by client", [*columns, *map(Column, titles)], rows, notes)


def _clients(found: Sequence[Pair]) -> Table:
    """Return every client's accuracy in run and fork, from the largest loss to the largest gain."""
    names = found[0][0].client_names
    if any(run.client_names != names for run, _, _ in found):
        names = ()
    told = [Column("fork", words=True), *client_columns(names)]
    rows = []
    for run, branch, at in found:
        rounds, table = differences((run, branch, at))
        before, after = (_measured(each)[int(rounds[-1])] for each in (run, branch))
        last = {client: float(value) for client, value in enumerate(table[-1]) if not np.isnan(value)}
        for client in sorted(last, key=last.__getitem__):
            values = percent(before[client]), percent(after[client]), difference(last[client])
            rows.append([word(branch.path.name), *client_cells(client, names), *values])
    columns = [*told, *map(Column, ("run, %", "fork, %", "difference, points"))]
    title = "Every client in the last round that run and fork both measured, largest loss first"
    return Table("fork_clients", title, columns, rows, open=False, searched=len(told))


def _changed(run: Run, branch: Run, at: int) -> str:
    """Return what the fork changed, then what later restarts of the fork and of its run changed."""
    own = branch.started_with("fork").get("settings", {})
    texts = [f"{name} {old} → {new}" for name, (old, new) in own.items() if None not in (old, new)]
    for of, where in ((branch, ""), (run, f"{run.path.name}: ")):
        texts += [
            f"{where}{name} {old} → {new} from round {after + 1}"
            for after, name, old, new in training_changes(of)
            if after > at or (after == at and name not in (own if of is branch else ()))
        ]
    return ", ".join(texts)


def _figure(pair: Pair, number: int) -> Figure:
    """Plot the clients' differences over rounds; `number` is that of several forks, else 0."""
    run, branch, at = pair
    rounds, table = differences(pair)

    def draw(canvas: Any, paint: Paint) -> None:
        axes = canvas.subplots()
        low, middle, high = (np.nanpercentile(table, share, axis=1) for share in (10, 50, 90))
        lines = style(0, paint), style(1, paint)
        axes.fill_between(
            rounds, per_cent(low), per_cent(high), color=lines[0].color, alpha=0.18, linewidth=0
        )
        axes.plot(rounds, per_cent(np.nanmean(table, axis=1)), label="mean", **lines[0].line(len(rounds)))
        axes.plot(rounds, per_cent(middle), label="median", **lines[1].line(len(rounds)))
        axes.axhline(0, color=paint.ink, linewidth=1)
        axes.set_ylabel("difference, points")
        rounds_axis(axes)
        legend_above(canvas, axes)

    caption = (
        f"Accuracy in {branch.path.name} minus accuracy in {run.path.name}, client by client, from "
        f"round {at}, where they are equal. Lines: over clients; band: 10th to 90th percentile."
    )
    name = f"fork_{number}" if number else "fork"
    return Figure(name, f"{branch.path.name} against {run.path.name}", caption, draw, (WIDTH, 3.0))
