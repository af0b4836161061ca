"""What is shown of several runs: methods by settings, with seeds as the replicates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from pfedmoe_mpi.report import compare, comparison_figures, paper_section
from pfedmoe_mpi.report.compare import ENOUGH, Comparison, Group, accuracy, known, mean_std
from pfedmoe_mpi.report.costs import operations, reachable, reached, traffic
from pfedmoe_mpi.report.document import Report, Section
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.tables import SPREAD, Cell, Column, Table, number, percent, ranks, short, spread, word


def report(runs: Sequence[Run], baseline: str, target: float | None) -> Report:
    """Everything about several runs.

    Raises:
        CompareError: see `compare.compare` and `Comparison.baseline`.
    """
    comparison = compare.compare(runs)
    base = comparison.baseline(baseline)
    drawn = [
        comparison_figures.curves(comparison, setting, n) for n, setting in enumerate(comparison.settings)
    ]
    sections = [
        Section("Results", [results(comparison), names(comparison)], drawn),
        *paper_section.sections(runs),
        _differences(comparison, base),
        Section("Target accuracy", targets(comparison, target)),
        Section("Cost", [cost(comparison)]),
        Section("Runs", [listed(comparison)]),
    ]
    seeds = sorted({run.seed for run in runs})
    return Report(
        title=" · ".join(comparison.methods) if len(comparison.methods) < 6 else "Comparison of methods",
        subtitle=f"{len(runs)} runs, seeds {', '.join(map(str, seeds))}",
        facts=[
            ("runs", str(len(runs))),
            ("methods", str(len(comparison.methods))),
            ("settings", str(len(comparison.settings))),
            ("seeds", str(len(seeds))),
        ],
        sections=sections,
        curves={
            comparison_figures.label(comparison, group): list(
                zip(*(part.tolist() for part in compare.curve(group)[:2]), strict=True)
            )
            for group in comparison.groups
        },
        notes=[*comparison.notes, *compare.unfinished(comparison)],
    )


def results(comparison: Comparison) -> Table:
    """The table of a paper: methods × settings."""
    columns = [Column("method", words=True), *(Column(setting, SPREAD) for setting in comparison.settings)]
    cells = {method: [word(method)] for method in comparison.methods}
    for setting in comparison.settings:
        found = {method: _accuracies(comparison.group(method, setting)) for method in comparison.methods}
        middle = {method: mean_std(values) for method, values in found.items()}
        marks = ranks([None if mean is None else round(mean, 4) for mean, _ in middle.values()])
        for (method, values), mark in zip(found.items(), marks, strict=True):
            cells[method].append(spread(*middle[method], len(values), mark))
    notes = [
        "test accuracy in %, mean over all clients, last round; mean ± standard deviation over seeds",
        "best bold, second underlined, per column, equals as shown alike; no test behind it",
    ]
    return Table("results", "Accuracy", columns, list(cells.values()), notes)


def _accuracies(group: Group | None) -> list[float]:
    return known(group.finished, accuracy) if group else []


def names(comparison: Comparison) -> Table:
    """The other accuracies by their names, and the area under the ROC curve; no column that is all empty."""
    wanted = {name: partial(accuracy, name=name) for name in ("mean", "weighted", "worst", "std")}
    for name, key in (("unseen", "accuracy_unseen"), ("AUC", "auc")):
        own = partial(_mean_of, key=key)
        wanted |= {name: own} if any(known(group.finished, own) for group in comparison.groups) else {}
    columns = [Column("method", words=True), Column("setting", words=True), Column("seeds")]
    columns += [Column(name, SPREAD) for name in wanted]
    rows = []
    for group in comparison.groups:
        cells = [word(group.method), word(group.setting), number(len(group.finished))]
        for value in wanted.values():
            values = known(group.finished, value)
            cells.append(spread(*mean_std(values), len(values)))
        rows.append(cells)
    notes = ["each over the clients of a run, in %, then mean ± standard deviation over seeds"]
    return Table("accuracies", "Accuracy by name", columns, rows, notes)


def _mean_of(run: Run, key: str) -> float | None:
    found = (run.last.get(key) or {}).get("mean")
    return None if found is None else float(found)


def _differences(comparison: Comparison, base: str | None) -> Section:
    if base is None:
        return Section("Differences", text="--baseline NAME compares every method with one of them.")
    pairs = comparison_figures.pairs(comparison, base)
    if not pairs:
        return Section("Differences", text=f"No other method shares a setting and a seed with {base}.")
    figures = []
    for n, setting in enumerate(comparison.settings):
        here = [pair for pair in pairs if pair[0].setting == setting]
        if here:
            figures.append(comparison_figures.intervals(comparison, setting, here, base, n))
        if any(len(compare.client_differences(group, other)) for group, other, _ in here):
            figures.append(comparison_figures.by_client(comparison, setting, here, base, n))
    return Section(
        f"Differences from {base}", [_paired(pairs, base), _spread_of_clients(pairs, base)], figures
    )


def _paired(pairs: Sequence[comparison_figures.Pair], base: str) -> Table:
    columns = [Column("method", words=True), Column("setting", words=True), Column("seeds")]
    columns += [
        Column("difference, points"),
        Column("95 % interval", ("low", "high")),
        Column("verdict", words=True),
    ]
    rows = []
    for group, _, found in pairs:
        bounds = (
            "–" if found.low is None or found.high is None else f"{points(found.low)} to {points(found.high)}"
        )
        cells = [
            number(len(found.seeds)),
            Cell(points(found.mean), (found.mean,)),
            Cell(bounds, (found.low, found.high)),
        ]
        rows.append([word(group.method), word(group.setting), *cells, word(found.verdict)])
    notes = [
        f"accuracy minus that of {base} with the same seed; t interval of the mean over seeds",
        f"below {ENOUGH} common seeds: too few to tell",
    ]
    return Table("differences", f"Paired difference from {base}", columns, rows, notes)


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.2f}".replace("-", "−")


def _spread_of_clients(pairs: Sequence[comparison_figures.Pair], base: str) -> Table:
    columns = [Column("method", words=True), Column("setting", words=True)]
    columns += [
        *map(Column, ("clients", "better", "equal", "worse", "10th percentile", "median", "90th percentile"))
    ]
    rows = []
    for group, other, _ in pairs:
        table = compare.client_differences(group, other)
        table = table[~np.isnan(table)]
        counts = [int(np.sum(found)) for found in (table > 0, table == 0, table < 0)]
        middle = np.percentile(table, (10, 50, 90)).tolist() if len(table) else [None] * 3
        shown = [Cell("–" if value is None else points(value), (value,)) for value in middle]
        rows.append([word(group.method), word(group.setting), *map(number, (len(table), *counts)), *shown])
    notes = [
        "each client's mean difference over the common seeds, in points",
        "shown, not tested: clients are no replicates",
    ]
    return Table("client_differences", f"Clients against {base}", columns, rows, notes)


def targets(comparison: Comparison, target: float | None) -> list[Table]:
    """Rounds, bytes and operations until the mean over clients first reached the target."""
    columns = [Column("method", words=True), Column("setting", words=True), Column("target, %")]
    columns += [
        Column("reached by"),
        Column("round", SPREAD),
        Column("MB sent", SPREAD),
        Column("GFLOP", SPREAD),
    ]
    rows = []
    for setting in comparison.settings:
        groups = [group for group in comparison.of(setting) if group.finished]
        wanted = (
            target if target is not None else reachable([run for group in groups for run in group.finished])
        )
        rows += [_target_row(group, wanted) for group in groups] if wanted is not None else []
    if all(cell[-1].values[0] is None for cell in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    given = (
        "the target"
        if target is not None
        else "the highest whole percent that every run of a setting reached"
    )
    notes = [
        f"first round at which the mean over clients reaches {given}; mean ± standard deviation over seeds",
        "a dash where not every seed reached it; MB up and down, of all clients; GFLOP estimated",
    ]
    return [Table("target", "Rounds and bytes to a target accuracy", columns, rows, notes)]


def _target_row(group: Group, target: float) -> list[Cell]:
    found = [reached(run, target) for run in group.finished]
    there = [one for one in found if one]
    share = Cell(f"{len(there)} of {len(found)}", (len(there),))
    cells = [word(group.method), word(group.setting), percent(target), share]
    everyone = len(there) == len(found)
    for values in ([one.round for one in there], [one.bytes / 1e6 for one in there]):
        cells.append(plain_spread(values if everyone else []))
    work = [one.operations / 1e9 for one in there if one.operations is not None]
    return [*cells, plain_spread(work if everyone and len(work) == len(there) else [])]


def plain_spread(values: Sequence[float]) -> Cell:
    """`mean ± std` of plain numbers, to the second digit of what varies; the mean alone if nothing does."""
    mean, std = mean_std(values)
    if mean is None:
        return Cell("–", (None, None, 0))
    places = max(0, 1 - math.floor(math.log10(std))) if std else None
    shown = short(mean) if places is None else f"{mean:.{places}f} ± {std:.{places}f}"
    return Cell(shown, (mean, std, len(values)))


def cost(comparison: Comparison) -> Table:
    """Means of a round."""
    titles = ("seconds per round", "MB per round", "GFLOP per round", "MiB, largest rank")
    columns = [
        Column("method", words=True),
        Column("setting", words=True),
        *(Column(t, SPREAD) for t in titles),
    ]
    rows = []
    for group in comparison.groups:
        cells = [word(group.method), word(group.setting)]
        for value in (_seconds, _megabytes, _giga_operations, _memory):
            cells.append(plain_spread(known(group.finished, value)))
        rows.append(cells)
    if all(row[4].values[0] is None for row in rows):
        columns, rows = [*columns[:4], *columns[5:]], [[*row[:4], *row[5:]] for row in rows]
    notes = [
        "mean over rounds, then mean ± standard deviation over seeds; seconds compare on like machines only"
    ]
    return Table("cost", "Cost of a round", columns, rows, notes)


def _seconds(run: Run) -> float | None:
    return mean_std([row["seconds"]["total"] for row in run.history if row["seconds"]["total"] is not None])[
        0
    ]


def _megabytes(run: Run) -> float | None:
    return mean_std([sent.total / 1e6 for sent in traffic(run)])[0]


def _giga_operations(run: Run) -> float | None:
    return mean_std([count / 1e9 for count in operations(run) or []])[0]


def _memory(run: Run) -> float | None:
    return max((row["rss_mb"] for row in run.history if row["rss_mb"] is not None), default=None)


def listed(comparison: Comparison) -> Table:
    """Every run with what it came to."""
    columns = [Column(title, words=True) for title in ("run", "method", "setting")]
    columns += [*map(Column, ("seed", "rounds", "of", "accuracy, %"))]
    rows = [
        [
            *(word(run.path.name), word(group.method), word(group.setting)),
            *(number(run.seed), number(run.done), number(run.planned), percent(accuracy(run))),
        ]
        for group in comparison.groups
        for run in group.runs
    ]
    return Table("runs", "Every run", columns, rows)
