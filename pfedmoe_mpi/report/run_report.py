"""The report on one run: the sections of its page, with their tables and figures."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from pfedmoe_mpi.report import (
    attack_section,
    confusion_section,
    distributions,
    drift_section,
    epsilon_section,
    gate_section,
    model_section,
    paper_section,
    rank_section,
    run_figures,
    settings_section,
)
from pfedmoe_mpi.report.compare import STD_OVER_CLIENTS, mean_std, over_clients, selection_notes
from pfedmoe_mpi.report.costs import reached, separating_targets, traffic
from pfedmoe_mpi.report.document import Report, Section
from pfedmoe_mpi.report.drawing import Figure
from pfedmoe_mpi.report.labels import value_text
from pfedmoe_mpi.report.load import STARTS, Run
from pfedmoe_mpi.report.model_views import ModelViews
from pfedmoe_mpi.report.settings_section import VERSIONS
from pfedmoe_mpi.report.tables import (
    Cell,
    Column,
    Table,
    amount,
    client_cells,
    client_columns,
    number,
    percent,
    word,
)

# Fields left out of the details in the table of events: its own columns, and what other tables show.
OMITTED = (
    *("time", "event", "round", "host", "hosts", "pid"),
    *("samples", "data_digest", "partition_digest", "class_counts", "client_names"),
    *("class_names", "numbers", "operations", "multiply_adds"),
)
# Why a client was left out of a sum, by the row's list that names it.
LEFT_OUT = (("dropped", "not finite"), ("lost", "lost before the sum"), ("late", "after the deadline"))


def report(run: Run, target: float | None, models: ModelViews | str = "") -> Report:
    """Return the report on one run.

    Args:
        target: accuracy of the target table, in (0, 1]; None for those of `separating_targets`.
        models: the evaluated models, or the sentence that says why they were not evaluated.
    """
    views = models if isinstance(models, ModelViews) else None
    state = "finished" if run.finished else f"unfinished: {run.done} of {run.planned} rounds"
    sections = [
        settings_section.section(run),
        *paper_section.sections([run]),
        _data(run),
        Section("Convergence", [_target(run, target)], [run_figures.convergence(run)]),
        Section("Clients", [_architectures(run), _clients(run, views)], [run_figures.clients(run)]),
        confusion_section.section(run),
        gate_section.section(run),
        model_section.section(views, run.names) if views else Section("Models", text=str(models)),
        *attack_section.sections(run),
        Section("Cost", [_costs(run), *_ranks(run)], _cost_figures(run)),
        Section("Events", [_events(run), *_left_out(run)]),
    ]
    return Report(
        title=f"{run.algorithm}, seed {run.seed}",
        subtitle=f"{run.path.name}: {run.clients} clients, {state}",
        facts=_facts(run),
        sections=[section for section in sections if section.tables or section.figures or section.text],
        curves={
            "accuracy": _curve(run, "accuracy"),
            "cohort, before the sum": _curve(run, "accuracy_cohort"),
        },
        notes=selection_notes([run]),
    )


def _curve(run: Run, name: str) -> list[tuple[float, float]]:
    return [(row["round"], row[name]["mean"]) for row in run.history if row[name]["mean"] is not None]


def _facts(run: Run) -> list[tuple[str, str]]:
    """Return the facts at the top of the page."""
    accuracy = run.selected["accuracy"]
    seconds = sum(row["seconds"]["total"] or 0 for row in run.history)
    facts = [
        ("rounds", f"{run.done} of {run.planned}"),
        (f"accuracy, round {run.selected['round']}{_why(run)}", percent(accuracy["mean"]).text + " %"),
        ("worst client", percent(accuracy["worst"]).text + " %"),
        *_by_class(run),
        ("training and evaluation", duration(seconds)),
        ("uploaded by all clients", size(sum(sent.up for sent in traffic(run)))),
        ("memory of the largest rank", f"{max(row['rss_mb'] or 0 for row in run.history):.0f} MiB"),
    ]
    if run.select != "last":
        name = f"accuracy, last round, {run.last['round']}"
        facts.insert(2, (name, percent(run.last["accuracy"]["mean"]).text + " %"))
    elif run.chosen:
        name = f"accuracy, round {run.chosen['round']}, chosen on validation rows"
        facts.insert(2, (name, percent(run.chosen["accuracy"]["mean"]).text + " %"))
    unseen = (run.selected.get("accuracy_unseen") or {}).get("mean")
    tuned = (run.selected.get("accuracy_tuned") or {}).get("mean")
    facts += [] if unseen is None else [("accuracy, unseen clients", percent(unseen).text + " %")]
    facts += [] if tuned is None else [("unseen clients, tuned", percent(tuned).text + " %")]
    facts += epsilon_section.facts(run)
    return [*facts, *drift_section.facts(run)]


def _by_class(run: Run) -> list[tuple[str, str]]:
    """Return the facts beside accuracy, without those that an earlier version did not record."""
    values = {
        "worst tenth of the clients": run.selected.get("accuracy_worst_tenth"),
        "macro-F1": (run.selected.get("macro_f1") or {}).get("mean"),
        "balanced accuracy": (run.selected.get("balanced_accuracy") or {}).get("mean"),
    }
    return [(name, percent(value).text + " %") for name, value in values.items() if value is not None]


def _why(run: Run) -> str:
    """Return how the reported round was chosen; nothing for the last."""
    return {"last": ""}.get(run.select, f", chosen on {run.select} rows")


def _data(run: Run) -> Section:
    counts = run.started_with("class_counts")
    if not counts:
        return Section("Data", text="The run did not record the classes of its clients.")
    table = np.array(counts)
    classes = (table > 0).sum(axis=1)
    columns = [
        *client_columns(run.client_names),
        Column("samples"),
        Column("classes"),
        *(Column(run.names.class_of(c)) for c in range(table.shape[1])),
    ]
    rows = [
        [
            *client_cells(k, run.client_names),
            *(number(int(n)) for n in (table[k].sum(), classes[k], *table[k])),
        ]
        for k in range(len(table))
    ]
    title, names = "Training samples by client and class", len(client_columns(run.client_names))
    partition = Table("partition", title, columns, rows, open=False, searched=names)
    many = len(table) > distributions.MANY
    figure = (
        distributions.partition(table)
        if many
        else run_figures.partition(table, run.client_labels, run.class_names)
    )
    return Section("Data", [partition], [figure])


def _target(run: Run, target: float | None) -> Table:
    """Return when the mean accuracy first reached `target`, or each of `separating_targets` if it is None."""
    shares = [target] if target is not None else separating_targets([run])
    columns = [Column("target, %"), Column("round"), Column("MB sent"), Column("GFLOP")]
    rows = []
    for share in shares:
        first = reached(run, share)
        rows.append(
            [
                percent(share),
                number(first.round if first else None),
                number(first.bytes / 1e6 if first else None, "{:.2f}"),
                number(None if not first or first.operations is None else first.operations / 1e9, "{:.1f}"),
            ]
        )
    if all(row[-1].values[0] is None for row in rows):
        columns, rows = columns[:3], [row[:3] for row in rows]
    notes = ["first round in which the mean over clients reaches the target; MB: up and down, all clients"]
    return Table("target", "Rounds and bytes to a target accuracy", columns, rows, notes)


def _architectures(run: Run) -> Table:
    """Summarise the accuracy of the clients that have trained, by architecture."""
    accuracy = run.selected["clients"]["accuracy"]
    absent = run.absent_clients(run.selected["round"])
    by_name: dict[str, list[float]] = {run.architecture(client): [] for client in range(run.clients)}
    for client, value in enumerate(accuracy):
        if value is not None and client not in absent:
            by_name[run.architecture(client)].append(value)
    columns = [
        Column("architecture", words=True),
        *map(Column, ("clients", "mean, %", "std, %", "worst, %", "best, %")),
    ]
    rows = []
    for name, values in by_name.items():
        mean, std = over_clients(values)
        ends = (min(values, default=None), max(values, default=None))
        shares = [percent(v) for v in (mean, std if len(values) > 1 else None, *ends)]
        rows.append([word(name), number(len(values)), *shares])
    title = f"Accuracy by architecture, round {run.selected['round']}"
    return Table("architectures", title, columns, rows, [STD_OVER_CLIENTS])


def _clients(run: Run, views: ModelViews | None) -> Table:
    """List every client from the lowest accuracy to the highest, those that have not trained at the end.

    Samples and classes are listed too: they are the first place to look for the cause of a low accuracy.
    """
    metrics: dict[str, Any] = dict(run.selected["clients"])
    counts = run.started_with("class_counts")
    absent = run.absent_clients(run.selected["round"])
    accuracy = metrics["accuracy"]
    order = sorted(range(run.clients), key=lambda k: (k in absent, accuracy[k] is None, accuracy[k], k))
    titles = ("samples", "classes", "accuracy, %", "before the sum, %", "loss", "α shared")
    columns = [
        *client_columns(run.client_names),
        Column("architecture", words=True),
        *map(Column, titles),
    ]
    rows = [
        [
            *client_cells(k, run.client_names),
            *(word(run.architecture(k)), number(metrics["samples"][k])),
            number(int((np.array(counts[k]) > 0).sum()) if counts else None),
            *(percent(accuracy[k]), percent(metrics.get("accuracy_before", accuracy)[k])),
            *(number(metrics["loss"][k], "{:.4f}"), number(metrics["alpha"][k], "{:.3f}")),
        ]
        for k in order
    ]
    auc = metrics.get("auc", [])
    if any(value is not None for value in auc):
        columns.append(Column("AUC, %"))
        rows = [[*row, percent(auc[k])] for row, k in zip(rows, order, strict=True)]
    if views and len(views.accuracy_shared) == run.clients:
        columns.append(Column("shared test, %"))
        rows = [
            [*row, model_section.share(views.accuracy_shared[k])] for row, k in zip(rows, order, strict=True)
        ]
    untrained = ", ".join(run.client_labels[k] for k in sorted(absent))
    notes = [f"not trained yet, excluded from every mean over clients: {untrained}"] if absent else []
    notes += [model_section.shared_note(views)] if views else []
    title = f"Clients after round {run.selected['round']}, worst first"
    names = len(client_columns(run.client_names)) + 1
    return Table("clients", title, columns, rows, notes, open=False, searched=names)


def _costs(run: Run) -> Table:
    """Summarise seconds, megabytes and memory over the rounds."""
    rows = []
    for name in ("train", "evaluate", "sum", "wait", "write", "total"):
        values = [row["seconds"][name] for row in run.history if row["seconds"].get(name) is not None]
        mean, _ = mean_std(values)
        largest = max(values, default=None)
        rows.append([word(f"seconds, {name}"), amount(sum(values)), amount(mean), amount(largest)])
    by_round = traffic(run)
    for name in ("up", "down", "once"):
        values = [getattr(sent, name) / 1e6 for sent in by_round]
        rows.append([word(f"MB, {name}"), *(amount(f(values)) for f in (sum, statistics.mean, max))])
    rows += _mask_costs(run)
    memory = [row["rss_mb"] for row in run.history if row["rss_mb"] is not None]
    rows.append(
        [
            word("memory of the largest rank, MiB"),
            number(None),
            number(mean_std(memory)[0]),
            number(max(memory, default=None)),
        ]
    )
    columns = [Column("what", words=True), Column("sum"), Column("mean of a round"), Column("largest")]
    notes = [
        "seconds: maximum over ranks, so the parts may add up to more than the total",
        "each mean is over the rounds that have a value",
        "MB: bytes that a deployment would send, summed over the members of the cohort; once: in a client's "
        "first cohort",
    ]
    sizes = run.started_with("numbers")
    if sizes:
        frozen = ", ".join(f"{kind} {size:,}" for kind, size in sizes["frozen"].items())
        notes.append(
            f"numbers in vectors: {sizes['server']:,} of the server, {sizes['client']:,} of a client; "
            f"frozen, once on every rank: {frozen}"
        )
    return Table("cost", "Time, bytes, memory", columns, rows, notes)


def _mask_costs(run: Run) -> list[list[Cell]]:
    """Return the rows on masked sums: bytes and seconds of a member and of the server; none without masks."""
    costs = [row["masks"] for row in run.history if row.get("masks")]
    whats = [(f"masks, MB {name} by member", "bytes", name, 1e6) for name in ("up", "down", "payload")]
    whats += [(f"masks, seconds of {name}", "seconds", name, 1.0) for name in ("member", "server")]
    rows = []
    for what, part, name, unit in whats if costs else ():
        values = [cost[part][name] / unit for cost in costs]
        rows.append([word(what), *(amount(f(values)) for f in (sum, statistics.mean, max))])
    return rows


def _ranks(run: Run) -> list[Table]:
    """Return each rank's mean seconds per round; nothing for one rank, where they are the round's."""
    by_phase = rank_section.seconds(run)
    if by_phase is None or len(by_phase["train"]) < 2:
        return []
    with np.errstate(invalid="ignore"):
        means = {name: np.nanmean(table, axis=1) for name, table in by_phase.items()}
    columns = [Column("rank"), *(Column(f"{name}, s") for name in means)]
    rows = [
        [number(rank), *(amount(float(values[rank])) for values in means.values())]
        for rank in range(len(by_phase["train"]))
    ]
    notes = ["mean over rounds; wait: for the other ranks, before the sum"]
    return [Table("ranks", "Seconds by rank", columns, rows, notes, open=len(rows) <= 16)]


def _cost_figures(run: Run) -> list[Figure]:
    return [run_figures.seconds(run), *rank_section.figures(run), run_figures.burden(run)]


def _events(run: Run) -> Table:
    """List the events; a restart shows only the versions that differ from those of the first start."""
    first = next((event for event in run.events if event["event"] in STARTS), {})
    rows = []
    for event in run.events:
        fields = {
            name: value
            for name, value in event.items()
            if name not in OMITTED
            and value not in (None, [], {})
            and (name not in VERSIONS or value != first.get(name))
        }
        details = "; ".join(f"{name}: {_detail(value)}" for name, value in fields.items())
        round = event.get("round")
        rows.append(
            [
                word(event.get("time", "")),
                word(event["event"]),
                number(round if isinstance(round, int) else None),
                word(details),
            ]
        )
    columns = [
        Column("time", words=True),
        Column("event", words=True),
        Column("round"),
        Column("details", words=True),
    ]
    return Table("events", "Starts, stops and faults", columns, rows)


def _detail(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else value_text(value)


def _left_out(run: Run) -> list[Table]:
    rows = []
    for key, reason in LEFT_OUT:
        times = Counter(client for row in run.history for client in row.get(key, []))
        rows += [
            [word(reason), *client_cells(client, run.client_names), number(count)]
            for client, count in sorted(times.items())
        ]
    columns = [Column("why", words=True), *client_columns(run.client_names), Column("rounds")]
    return [Table("left_out", "Clients left out of a sum", columns, rows)] if rows else []


def duration(seconds: float) -> str:
    """Return `12 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Return a number of bytes in the decimal unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
