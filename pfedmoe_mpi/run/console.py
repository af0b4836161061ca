"""The output of rank 0: the plan before round 1, a line or a bar per round, a table of clients at the end."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import count, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfedmoe_mpi import config
from pfedmoe_mpi.config.flags import shown
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.data.summary import plain
from pfedmoe_mpi.federation import disk, drift, selection
from pfedmoe_mpi.federation.effective import proposals
from pfedmoe_mpi.federation.metrics import Row
from pfedmoe_mpi.log import LOGGER
from pfedmoe_mpi.models.names import labels
from pfedmoe_mpi.run import privacy_lines

if TYPE_CHECKING:
    from pfedmoe_mpi.algorithms.base import Task
    from pfedmoe_mpi.config import Config
    from pfedmoe_mpi.federation.federation import Federation


SECONDS_BETWEEN_LINES = 60.0  # within a round, where there is no bar
MOST_ROWS = 40  # clients in a table
MOST_NAMES = 10  # names of the data's own clients in the plan
SHOWN = {
    "accuracy": "accuracy",
    "validation": "accuracy_validation",
    "cohort, before the sum": "accuracy_cohort",
    "unseen": "accuracy_unseen",
}


def megabytes(numbers: float) -> str:
    """Return the size of float32 numbers as text in MB."""
    return f"{4 * numbers / 1e6:.2f} MB"


def plan(
    federation: Federation,
    device_lines: Sequence[str],
    ranks: Sequence[disk.Scratch],
    folder: Path,
    done: disk.Done = disk.NEW,
) -> list[str]:
    """Return the plan's lines: what is shared, what is private, one line per rank, memory, scratch and disk.

    Args:
        ranks: what each rank has for its clients' vectors.
        folder: of the run.
        done: what a resumed run has.
    """
    settings, task = federation.config, federation.task
    lines = [
        f"{settings.method} on {federation.dataset.name}: {task.clients} clients, "
        f"{_cohort(settings)}, {settings.rounds} rounds, "
        f"sample {_sample(task)}, {task.classes} classes, d = {task.dim}",
        *federation.dataset.summary,
    ]
    if task.unseen:
        listed, why = ", ".join(map(str, sorted(task.unseen))), federation.method.no_answer_reason
        lines.append(f"unseen clients: {listed}" + (f"; no accuracy, because {why}" if why else ""))
    names = federation.partition.client_names
    if names:
        listed = ", ".join(f"{k} {name}" for k, name in enumerate(names[:MOST_NAMES]))
        lines.append(f"the data's own clients: {listed}{', …' if len(names) > MOST_NAMES else ''}")
    flat = config.flatten(config.to_tree(settings))
    proposed = proposals(federation.dataset, settings.partition.kind).items()
    accepted = [f"{name} = {value}" for name, value in proposed if flat[name] == value]
    if accepted:
        lines.append(f"proposed by the data: {', '.join(accepted)}")
    lines += ["shared:  " + line for line in _describe(federation.state_layout)]
    for number, name in enumerate(labels(task.pool)[: task.clients]):
        clients = len(range(number, task.clients, len(task.pool)))
        private = _describe(federation.client_layouts[number])
        lines += [f"private: {line} ({name}, {clients} clients)" for line in private]
    lines += _describe_frozen(federation)
    lines += federation.pretrained.lines
    lines += privacy_lines.plan(federation)
    lines += _rank_lines(device_lines)
    return [*lines, memory(federation, len(ranks)), *disk.lines(federation, ranks, folder, done)]


def changed(changes: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return a line for each setting that differs from the run's before: {setting: (before, after)}."""
    return [
        f"changed: {name} from {shown(before)} to {shown(after)}" for name, (before, after) in changes.items()
    ]


def _cohort(settings: Config) -> str:
    """Return how many clients train in a round."""
    if settings.privacy.draws_clients:
        return f"cohort about {settings.expected_cohort:.3g}, drawn by Poisson"
    return f"cohort {settings.cohort_size}"


def _rank_lines(device_lines: Sequence[str]) -> Iterator[str]:
    """Yield a line per rank, and one for three or more equal neighbours."""
    ranks = count()
    for line, equal in groupby(device_lines):
        group = [next(ranks) for _ in equal]
        if len(group) > 2:
            yield f"ranks {group[0]} to {group[-1]}, each: {line}"
        else:
            yield from (f"rank {rank}: {line}" for rank in group)


def _sample(task: Task) -> str:
    """Return the shape of a sample as text."""
    shape = "×".join(map(str, task.shape))
    return f"{shape} of {task.vocabulary} tokens" if task.vocabulary else shape


def _describe(layout: Layout) -> list[str]:
    """Return one line per part: tensors, trained parameters, and all numbers with buffers."""
    lines = []
    for part, size in layout.sizes.items():
        entries = [e for e in layout.entries if e.name.partition("/")[0] == part]
        parameters = sum(e.size for e in entries if e.trained)
        numbers = f"{parameters:,} parameters, {size:,} numbers, {megabytes(size)}"
        lines.append(f"{part}: {len(entries)} tensors, {numbers}")
    return lines or ["nothing"]


def _describe_frozen(federation: Federation) -> list[str]:
    """Return one line per kind of model with frozen tensors, which every rank holds once."""
    lines = []
    for kind, layout in federation.frozen.layouts.items():
        lines.append(f"frozen:  {kind}: {layout.size:,} numbers, {megabytes(layout.size)}")
        if found := federation.engine.kept.tails.get(kind) if federation.engine.kept else None:
            augment = federation.config.train.augment and len(federation.task.shape) == 3
            when = "per client for evaluations (train.augment)" if augment else "per client"
            lines[-1] += f"; outputs, {found.size:,} numbers a sample, computed once {when}"
    return lines


def memory(federation: Federation, ranks: int) -> str:
    """Return a line on the job's memory: all clients' vectors and data, and a rank's bound models.

    Vectors beyond a rank's budget, here rank 0's, are in a file.
    """
    vectors = sum(layout.size for layout in federation.client_layouts)
    different = {id(layout): layout for layout in federation.client_layouts}.values()
    kinds = {layout.digest: layout.size for layout in different}
    bound = 4 * (sum(kinds.values()) + federation.state_layout.size)  # weights, gradients, momenta, a copy
    bound += sum(layout.size for layout in federation.frozen.layouts.values())
    sample = federation.dataset.dtype.itemsize
    for length in federation.task.shape:
        sample *= length
    splits = (federation.partition.train, federation.partition.validation, federation.partition.test)
    data = sample * sum(len(split.flat) for split in splits)
    most = f", at most {disk.in_units(federation.store.budget)} of them on a rank (run.memory)"
    return (
        f"memory: clients' vectors {megabytes(vectors)} once all have trained"
        f"{most if federation.store.budget < 4 * vectors else ''}, and data "
        f"{data / 1e6:.1f} MB over {ranks} rank(s); "
        f"on each rank about {megabytes(bound)} of bound models, not counting torch and activations"
    )


class Progress:
    """A progress bar on a terminal, else one line per round; LOGGER gets the line in both cases.

    Within a round the bar shows rank 0's clients; without a bar they get a line once a minute.
    """

    def __init__(self, rounds: int, done: int, clients: int) -> None:
        self._rounds = rounds
        self._clients, self._accuracy = clients, ""  # clients of this rank; the last accuracy as text
        self._started, self._first = time.monotonic(), done
        self._printed = self._started  # when the last line was
        self._bar: Any = None
        # Open MPI gives its ranks a terminal even when the job's output goes into a file.
        if sys.stdout.isatty() and "OMPI_COMM_WORLD_SIZE" not in os.environ:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                *(TextColumn("round"), MofNCompleteColumn(), BarColumn(10)),  # the line fits into 80 columns
                *(TextColumn("{task.description}"), TimeRemainingColumn()),
            )
            self._bar.start()
            self._task = self._bar.add_task(f"{clients} clients here", total=rounds, completed=done)

    def client_trained(self, round: int, done: int, members: int) -> None:
        """Show how many of rank 0's clients of a round have trained."""
        text = f"rank 0: {done} of {members} clients"
        if self._bar:
            self._bar.update(self._task, description=f"{self._accuracy}{text}")
        elif time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            print(f"round {round}/{self._rounds}  {text}", flush=True)

    def round_done(self, row: Row) -> None:
        """Show a complete round and the time left."""
        means = {name: row[key]["mean"] for name, key in SHOWN.items()}
        measured = [f"{name} {_percent(mean)}" for name, mean in means.items() if mean is not None]
        loss = "-" if row["train_loss"] is None else f"{row['train_loss']:.4f}"
        each = (time.monotonic() - self._started) / (row["round"] - self._first)
        left = timedelta(seconds=round(each * (self._rounds - row["round"])))
        seconds = f"{row['seconds']['total']:.2f} s, {left} left"
        line = "  ".join([f"round {row['round']}/{self._rounds}", *measured, f"loss {loss}", seconds])
        LOGGER.info(line)
        self._printed = time.monotonic()
        if self._bar:
            if measured:
                self._accuracy = f"accuracy {_percent(means['accuracy'])}, "
            description = f"{self._accuracy}{self._clients} clients here"
            self._bar.update(self._task, completed=row["round"], description=description)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Restore the terminal."""
        if self._bar:
            self._bar.stop()


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def unseen_line(row: Row) -> str:
    """Return a line with the accuracies of unseen clients that were measured; "" if none was."""
    measured = [("", row["accuracy_unseen"]["mean"]), ("after tuning ", row["accuracy_tuned"]["mean"])]
    texts = [name + _percent(value) for name, value in measured if value is not None]
    return f"unseen clients: accuracy mean {', '.join(texts)}" if texts else ""


def table(federation: Federation, history: Sequence[Row]) -> str:
    """Return the text at the end of a run: the table of clients, last and best round, failures."""
    last, top = history[-1], selection.best(history, after=federation.config.run.forked)
    lines = [_client_table(federation, last), "last  " + _line(last), _by_class(last)]
    if unseen := unseen_line(last):
        lines.append(unseen)
    if last.get("privacy"):
        lines.append(privacy_lines.line(last["privacy"], last["round"]))
    if last["drift"]:
        lost, rounds = last["drift"]["forgetting"], last["drift"]["recovery"]
        recovery = "not recovered yet" if rounds is None else f"recovered after {rounds} rounds"
        new = _percent(drift.accuracies(last)[0])
        lines.append(
            f"drift: accuracy {new} on the new concept, {_percent(lost)} of the old one forgotten, {recovery}"
        )
    for key, why in (("dropped", "not finite"), ("lost", "lost"), ("late", "after the deadline")):
        count = Counter(client for row in history for client in row.get(key, []))
        if count:
            listed = ", ".join(f"{client} ({times} ×)" for client, times in sorted(count.items()))
            lines.append(f"left out, {why}: client {listed}")
    lines += _masks(history)
    if top:
        lines.append(f"best on {selecting_rows(history)}: {_line(top)}")
    return "\n".join(lines)


def _masks(history: Sequence[Row]) -> list[str]:
    """Return the lines on masked sums: their cost, and the rounds that could not be opened."""
    costs = {row["round"]: row["masks"] for row in history if row.get("masks")}
    if not costs:
        return []

    def mean(part: str, name: str) -> float:
        return sum(cost[part][name] for cost in costs.values()) / len(costs)

    up, down, payload = (f"{mean('bytes', name) / 1e3:.1f} kB" for name in ("up", "down", "payload"))
    member, server = (f"{mean('seconds', name):.3g} s" for name in ("member", "server"))
    lines = [
        f"masked sums, mean of a round: a member sends {up} and receives {down} in {member}, beside its "
        f"contribution of {payload}; the server opens the sum in {server}"
    ]
    lost = [str(round) for round, cost in costs.items() if not cost["opened"]]
    if lost:
        lines.append(f"masked sums that too few members were left to open: round {', '.join(lost)}")
    return lines


def early_end(settings: Config, history: Sequence[Mapping[str, Any]]) -> str:
    """Return the line on a run that `run.patience` ended; nothing if all rounds are done."""
    patience = settings.run.patience
    if len(history) >= settings.rounds or not selection.exhausted(history, patience, settings.run.forked):
        return ""
    return (
        f"ended after {len(history)} of {settings.rounds} rounds: "
        f"none was better on validation for {patience} rounds (run.patience = {patience})"
    )


def selecting_rows(history: Sequence[Row]) -> str:
    """Return the rows whose accuracy chooses the best round: validation or test."""
    return selection.ROWS[selection.selected_on(history)]


def _client_table(federation: Federation, row: Row) -> str:
    """Return a table of a round: a client's architecture, training samples, classes, accuracy and α.

    Beyond MOST_ROWS clients it has the worst, the median and the best of those measured.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    task, clients = federation.task, dict(row["clients"])
    architectures = labels(task.pool)
    columns = {"AUC": clients["auc"], "α shared": clients["alpha"]}
    columns = {name: values for name, values in columns.items() if any(v is not None for v in values)}
    title = f"clients after round {row['round']}"
    shown = list(range(task.clients))
    if task.clients > MOST_ROWS:
        shown = worst_median_best(clients["accuracy"])
        title = f"worst, median and best of {task.clients} {title}"
    table = Table(title=title)
    names = plain(federation.partition.client_names, task.clients)
    named = ["name"] if names else []
    for heading in ("client", *named, "architecture", "samples", "classes", "accuracy", *columns):
        table.add_column(heading, justify="right")
    for k in shown:
        classes = int((task.counts[k] > 0).sum())
        cells = [str(k), *(escape(name) for name in names[k : k + 1]), architectures[k % len(architectures)]]
        cells += [str(task.samples(k)), str(classes), _percent(clients["accuracy"][k])]
        table.add_row(*cells, *(_three_digits(values[k]) for values in columns.values()))
    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def worst_median_best(accuracy: Sequence[float | None]) -> list[int]:
    """Return the clients with the lowest, the median and the highest accuracy of those that have one."""
    order = sorted((value, client) for client, value in enumerate(accuracy) if value is not None)
    places = dict.fromkeys((0, (len(order) - 1) // 2, len(order) - 1)) if order else {}
    return [order[place][1] for place in places]


def _three_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _by_class(row: Row) -> str:
    f1, balanced = row["macro_f1"]["mean"], row["balanced_accuracy"]["mean"]
    return (
        f"macro-F1 {_percent(f1)}, balanced accuracy {_percent(balanced)}, worst tenth of the clients "
        f"{_percent(row['accuracy_worst_tenth'])}, {row['test_samples']:,} test samples"
    )


def _line(row: Row) -> str:
    a = row["accuracy"]
    return (
        f"round {row['round']}, test accuracy mean {_percent(a['mean'])}, weighted {_percent(a['weighted'])}"
        f", population std {_percent(a['std'])}, worst {_percent(a['worst'])}"
    )
