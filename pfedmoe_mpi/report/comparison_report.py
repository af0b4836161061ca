"""The report on several runs: methods by settings, with seeds as the replicates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from pfedmoe_mpi.report import (
    client_section,
    compare,
    comparison_figures,
    drift_section,
    epsilon_section,
    fork_section,
    paper_section,
    peer_section,
)
from pfedmoe_mpi.report.compare import (
    BEFORE_SUM,
    ENOUGH,
    MOMENT_BEFORE_SUM,
    STD_OVER_CLIENTS,
    STD_OVER_SEEDS,
    WHEN,
    Comparison,
    Group,
    accuracy,
    chosen_accuracy,
    cohort_accuracy,
    last_accuracy,
    mean_std,
    selection_notes,
    values_of,
)
from pfedmoe_mpi.report.costs import operations, reached, separating_targets, total, traffic
from pfedmoe_mpi.report.document import Report, Section
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.periods import with_trunks
from pfedmoe_mpi.report.tables import (
    SPREAD,
    Cell,
    Column,
    Table,
    difference,
    interval,
    number,
    percent,
    ranks,
    short,
    spread,
    word,
)
from pfedmoe_mpi.storage.peer_results import PeerResult

Metric = Callable[[Run], float | None]


def report(
    runs: Sequence[Run], baseline: str, target: float | None, peers: Sequence[PeerResult] = ()
) -> Report:
    """Return the report on several runs, with the results of other programs.

    Raises:
        CompareError: see `compare.compare` and `Comparison.baseline`.
    """
    comparison = compare.compare(with_trunks(runs))
    base = comparison.baseline(baseline)
    curves = [
        comparison_figures.curves(comparison, setting, n) for n, setting in enumerate(comparison.settings)
    ]
    sections = [
        Section("Results", [results(comparison), accuracies(comparison), *fairness(comparison)], curves),
        *paper_section.sections(runs),
        *peer_section.sections(comparison, peers),
        _differences(comparison, base),
        *fork_section.sections(runs),
        *client_section.sections(comparison),
        *drift_section.sections(comparison, base),
        *epsilon_section.sections(comparison),
        _target_section(comparison, target),
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
        notes=[
            *comparison.notes,
            *compare.unfinished(comparison),
            *compare.pairing_notes(comparison, base),
            *selection_notes(runs),
        ],
    )


def results(comparison: Comparison) -> Table:
    """Return the main table: methods × settings."""
    columns = [Column("method", words=True), *(Column(setting, SPREAD) for setting in comparison.settings)]
    cells = {method: [word(method)] for method in comparison.methods}
    for setting in comparison.settings:
        seeds = {method: _mean_accuracies(comparison.group(method, setting)) for method in comparison.methods}
        moments = {method: mean_std(values) for method, values in seeds.items()}
        marks = ranks([None if mean is None else round(mean, 4) for mean, _ in moments.values()])
        for (method, values), mark in zip(seeds.items(), marks, strict=True):
            cells[method].append(spread(*moments[method], len(values), mark))
    notes = [
        f"test accuracy in %, mean over all clients after the sum, {when(comparison)}; {STD_OVER_SEEDS}",
        "per column: best in bold, second best underlined, ties as printed; not a statistical test",
    ]
    return Table("results", "Accuracy", columns, list(cells.values()), notes)


def when(comparison: Comparison) -> str:
    """Return the round of each run whose accuracies are reported."""
    return WHEN[comparison.groups[0].runs[0].select]


def _mean_accuracies(group: Group | None) -> list[float]:
    return values_of(group.finished, accuracy) if group else []


def accuracies(comparison: Comparison) -> Table:
    """Return all accuracies and the area under the ROC curve, without columns that would be empty."""
    metrics: dict[str, Metric] = {
        name: partial(accuracy, name=name) for name in ("mean", "weighted", "worst", "std")
    }
    optional: dict[str, Metric] = {
        BEFORE_SUM: cohort_accuracy,
        "unseen": partial(_mean_of, key="accuracy_unseen"),
        "unseen, tuned": partial(_mean_of, key="accuracy_tuned"),
        "AUC": partial(_mean_of, key="auc"),
    }
    if comparison.groups[0].runs[0].select == "last":
        optional["round chosen on validation"] = chosen_accuracy
    else:
        optional["last round"] = last_accuracy
    metrics |= {name: metric for name, metric in optional.items() if _is_measured(comparison, metric)}
    table = _details(comparison, "accuracies", "Accuracy in detail", metrics)
    return replace(table, notes=[*table.notes, MOMENT_BEFORE_SUM]) if BEFORE_SUM in metrics else table


def fairness(comparison: Comparison) -> list[Table]:
    """Return the table of metrics in which no class and no client is lost in a mean; none if unmeasured."""
    metrics: dict[str, Metric] = {
        "worst tenth": _worst_tenth,
        "macro-F1": partial(_mean_of, key="macro_f1"),
        "balanced accuracy": partial(_mean_of, key="balanced_accuracy"),
    }
    metrics = {name: metric for name, metric in metrics.items() if _is_measured(comparison, metric)}
    title = "Every class and the worst clients"
    return [_details(comparison, "fairness", title, metrics)] if metrics else []


def _is_measured(comparison: Comparison, metric: Metric) -> bool:
    return any(values_of(group.finished, metric) for group in comparison.groups)


def _details(comparison: Comparison, name: str, title: str, metrics: Mapping[str, Metric]) -> Table:
    """Return a table of metrics by method and setting."""
    columns = [Column("method", words=True), Column("setting", words=True), Column("seeds")]
    columns += [Column(metric, SPREAD) for metric in metrics]
    rows = []
    for group in comparison.groups:
        cells = [word(group.method), word(group.setting), number(len(group.finished))]
        for metric in metrics.values():
            values = values_of(group.finished, metric)
            cell = spread(*mean_std(values), len(values))
            few = 0 < len(values) < len(group.finished)
            cells.append(replace(cell, text=f"{cell.text} ({len(values)})") if few else cell)
        rows.append(cells)
    notes = [
        f"in %, {when(comparison)}, over the clients of each run ({STD_OVER_CLIENTS}); then {STD_OVER_SEEDS}"
    ]
    if any(cell.text.endswith(")") for row in rows for cell in row[3:]):
        notes.append("in brackets: the seeds that have the value, where the others have none")
    return Table(name, title, columns, rows, notes)


def _mean_of(run: Run, key: str) -> float | None:
    mean = (run.selected.get(key) or {}).get("mean")
    return None if mean is None else float(mean)


def _worst_tenth(run: Run) -> float | None:
    value = run.selected.get("accuracy_worst_tenth")
    return None if value is None else float(value)


def _differences(comparison: Comparison, base: str | None) -> Section:
    if base is None:
        return Section(
            "Differences", text="No baseline: set --baseline METHOD to compare every method with one of them."
        )
    pairs = comparison_figures.pairs(comparison, base)
    if not pairs:
        return Section(
            "Differences", text=f"No other method has a setting, a seed and its data in common with {base}."
        )
    figures = []
    for n, setting in enumerate(comparison.settings):
        pairs_of_setting = [pair for pair in pairs if pair[0].setting == setting]
        if pairs_of_setting:
            figures.append(comparison_figures.intervals(comparison, setting, pairs_of_setting, base, n))
        if any(len(compare.client_differences(group, other)) for group, other, _ in pairs_of_setting):
            figures.append(
                comparison_figures.client_differences(comparison, setting, pairs_of_setting, base, n)
            )
    return Section(
        f"Differences from {base}",
        [_paired_differences(pairs, base), _client_differences(pairs, base)],
        figures,
    )


def _paired_differences(pairs: Sequence[comparison_figures.Pair], base: str) -> Table:
    columns = [Column("method", words=True), Column("setting", words=True), Column("seeds")]
    columns += [
        Column("difference, points"),
        Column("95 % interval", ("low", "high")),
        Column("verdict", words=True),
    ]
    rows = []
    for group, _, paired in pairs:
        cells = [number(len(paired.seeds)), difference(paired.mean), interval(paired.low, paired.high)]
        rows.append([word(group.method), word(group.setting), *cells, word(paired.verdict)])
    notes = [
        f"accuracy minus that of {base} with the same seed and data: mean over seeds and its 95 % t interval",
        f"too few to tell: fewer than {ENOUGH} common seeds",
    ]
    return Table("differences", f"Paired difference from {base}", columns, rows, notes)


def _client_differences(pairs: Sequence[comparison_figures.Pair], base: str) -> Table:
    columns = [Column("method", words=True), Column("setting", words=True)]
    titles = ("clients", "better", "equal", "worse", "share better, %")
    columns += map(Column, (*titles, "10th percentile", "median", "90th percentile"))
    rows = []
    for group, other, _ in pairs:
        table = compare.client_differences(group, other)
        table = table[~np.isnan(table)]
        counts = [int(np.sum(mask)) for mask in (table > 0, table == 0, table < 0)]
        share = percent(counts[0] / len(table) if len(table) else None)
        percentiles = np.percentile(table, (10, 50, 90)).tolist() if len(table) else [None] * 3
        cells = [difference(value) for value in percentiles]
        rows.append(
            [word(group.method), word(group.setting), *map(number, (len(table), *counts)), share, *cells]
        )
    notes = [
        f"each client's accuracy minus that with {base}, mean over the common seeds, in points",
        "descriptive, not tested: clients are not replicates",
    ]
    return Table("client_differences", f"Difference from {base} by client", columns, rows, notes)


def _target_section(comparison: Comparison, target: float | None) -> Section:
    table = targets(comparison, target)
    if table.rows:
        return Section("Target accuracy", [table])
    text = "No run reached a higher whole per cent than all runs in their first measured round: set --target."
    return Section("Target accuracy", text=text)


def targets(comparison: Comparison, target: float | None) -> Table:
    """Return rounds, bytes and operations until the mean over clients first reached each target."""
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
        finished = [run for group in groups for run in group.finished]
        shares = [target] if target is not None else separating_targets(finished)
        rows += [_target_row(group, share) for share in shares for group in groups]
    if all(row[-1].values[0] is None for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    notes = [f"first round in which the mean over clients reaches the target; {STD_OVER_SEEDS}"]
    if target is None:
        notes.append("left out: targets that every run of a setting reached in its first measured round")
    notes += [
        "dash: not every seed reached it, or not recorded; MB: up and down, all clients",
        "GFLOP: training by clients; a fork's rounds before the fork count if its run is here, too",
    ]
    return Table("target", "Rounds and bytes to a target accuracy", columns, rows, notes)


def _target_row(group: Group, target: float) -> list[Cell]:
    by_run = [reached(run, target) for run in group.finished]
    costs = [cost for cost in by_run if cost]
    all_reached = len(costs) == len(by_run)
    cells = [word(group.method), word(group.setting), percent(target)]
    cells.append(Cell(f"{len(costs)} of {len(by_run)}", (len(costs),)))
    for values in ([cost.round for cost in costs], [cost.bytes / 1e6 for cost in costs]):
        cells.append(plain_spread(values if all_reached else []))
    gigaflops = [cost.operations / 1e9 for cost in costs if cost.operations is not None]
    return [*cells, plain_spread(gigaflops if all_reached and len(gigaflops) == len(costs) else [])]


def plain_spread(values: Sequence[float]) -> Cell:
    """Return `mean ± std` of numbers, to two digits of the deviation; the mean alone if they do not vary."""
    mean, std = mean_std(values)
    if mean is None:
        return Cell("–", (None, None, 0))
    places = max(0, 1 - math.floor(math.log10(std))) if std else None
    text = short(mean) if places is None else f"{mean:.{places}f} ± {std:.{places}f}"
    return Cell(text, (mean, std, len(values)))


def cost(comparison: Comparison) -> Table:
    """Return the mean cost of a round."""
    titles = ("seconds per round", "MB per round", "GFLOP per round", "memory, largest rank, MiB")
    columns = [
        Column("method", words=True),
        Column("setting", words=True),
        *(Column(t, SPREAD) for t in titles),
    ]
    rows = []
    for group in comparison.groups:
        cells = [word(group.method), word(group.setting)]
        for value in (_seconds, _megabytes, _giga_operations, _memory):
            values = values_of(group.finished, value)
            cells.append(plain_spread(values if len(values) == len(group.finished) else []))
        rows.append(cells)
    if all(row[4].values[0] is None for row in rows):
        columns, rows = [*columns[:4], *columns[5:]], [[*row[:4], *row[5:]] for row in rows]
    notes = [
        f"mean over rounds (memory: maximum), then {STD_OVER_SEEDS}",
        "compare seconds only between runs on equal machines",
    ]
    return Table("cost", "Cost of a round", columns, rows, notes)


def _seconds(run: Run) -> float | None:
    seconds = [row["seconds"]["total"] for row in run.history]
    return mean_std([value for value in seconds if value is not None])[0]


def _megabytes(run: Run) -> float | None:
    return mean_std([sent.total / 1e6 for sent in traffic(run)])[0]


def _giga_operations(run: Run) -> float | None:
    summed = total(operations(run))
    return None if summed is None else summed / len(run.history) / 1e9


def _memory(run: Run) -> float | None:
    return max((row["rss_mb"] for row in run.history if row["rss_mb"] is not None), default=None)


def listed(comparison: Comparison) -> Table:
    """Return every run with its rounds and its accuracy."""
    columns = [Column(title, words=True) for title in ("run", "method", "setting")]
    columns += [*map(Column, ("seed", "rounds", "of", "accuracy, %", "in round"))]
    rows = [
        [
            *(word(run.path.name), word(group.method), word(group.setting)),
            *(number(run.seed), number(run.done), number(run.planned), percent(accuracy(run))),
            number(run.selected["round"]),
        ]
        for group in comparison.groups
        for run in group.runs
    ]
    return Table("runs", "All runs", columns, rows)
