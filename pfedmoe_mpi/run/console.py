"""What rank 0 shows: the plan before round 1, a line or a bar per round, a table of clients at the end."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pfedmoe_mpi import config
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.federation.metrics import Row, best
from pfedmoe_mpi.log import LOGGER

if TYPE_CHECKING:
    from pfedmoe_mpi.algorithms.base import Task
    from pfedmoe_mpi.federation.federation import Federation


NAMES = 10  # of the data's own clients in the plan
SHOWN = {"accuracy": "accuracy", "cohort, before the sum": "accuracy_cohort", "unseen": "accuracy_unseen"}


def megabytes(numbers: float) -> str:
    """float32 numbers as MB."""
    return f"{4 * numbers / 1e6:.2f} MB"


def plan(federation: Federation, device_lines: Sequence[str]) -> list[str]:
    """What is shared and what is private, one line per rank, and the memory the job will need."""
    settings, task = federation.config, federation.task
    lines = [
        f"{settings.algorithm} on {federation.dataset.name}: {task.clients} clients, "
        f"cohort {settings.cohort_size}, {settings.rounds} rounds, "
        f"sample {_sample(task)}, {task.classes} classes, d = {task.dim}"
    ]
    if task.unseen:
        listed, why = ", ".join(map(str, sorted(task.unseen))), federation.method.unseen_null
        lines.append(f"unseen clients: {listed}" + (f"; no accuracy, because {why}" if why else ""))
    if federation.dataset.client_names and settings.partition.kind == "natural":
        names = federation.dataset.client_names
        named = ", ".join(f"{k} {name}" for k, name in enumerate(names[:NAMES]))
        lines.append(f"the data's own clients: {named}{', …' if len(names) > NAMES else ''}")
    flat = config.flatten(config.to_tree(settings))
    taken = [f"{name} {value}" for name, value in federation.dataset.proposals.items() if flat[name] == value]
    if taken:
        lines.append(f"as the data propose: {', '.join(taken)}")
    lines += ["shared:  " + line for line in _describe(federation.state_layout)]
    for number, name in enumerate(task.pool[: task.clients]):
        same = len(range(number, task.clients, len(task.pool)))
        private = _describe(federation.client_layouts[number])
        lines += [f"private: {line} ({name}, {same} clients)" for line in private]
    lines += [f"rank {rank}: {line}" for rank, line in enumerate(device_lines)]
    return [*lines, memory(federation, len(device_lines))]


def _sample(task: Task) -> str:
    shape = "×".join(map(str, task.shape))
    return f"{shape} of {task.vocabulary} tokens" if task.vocabulary else shape


def _describe(layout: Layout) -> list[str]:
    lines = []
    for part, place in layout.parts.items():
        entries = [e for e in layout.entries if e.name.partition("/")[0] == part]
        parameters = sum(e.size for e in entries if e.trained)
        size = place.stop - place.start
        numbers = f"{parameters:,} parameters, {size:,} numbers, {megabytes(size)}"
        lines.append(f"{part}: {len(entries)} tensors, {numbers}")
    return lines or ["nothing"]


def memory(federation: Federation, ranks: int) -> str:
    """The numbers the job holds: vectors of all clients, data, and the bound models of a rank."""
    vectors = sum(layout.size for layout in federation.client_layouts)
    kinds = {layout.digest: layout.size for layout in federation.client_layouts}
    bound = 4 * (sum(kinds.values()) + federation.state_layout.size)  # weights, gradients, momenta, a copy
    sample = federation.dataset.dtype.itemsize
    for length in federation.task.shape:
        sample *= length
    splits = (federation.partition.train, federation.partition.validation, federation.partition.test)
    data = sample * sum(len(rows) for split in splits for rows in split)
    return (
        f"memory: clients' vectors {megabytes(vectors)} and data {data / 1e6:.1f} MB over {ranks} ranks; "
        f"on each rank about {megabytes(bound)} of bound models, beside torch and activations"
    )


class Progress:
    """A progress bar on a terminal, else one line per round; LOGGER gets the line either way."""

    def __init__(self, rounds: int, done: int, clients: int) -> None:
        self._rounds = rounds
        self._clients, self._shown = clients, ""
        self._started, self._first = time.monotonic(), done
        self._bar: Any = None
        # Open MPI gives its ranks a terminal of its own, also where the job's output goes into a file.
        if sys.stdout.isatty() and "OMPI_COMM_WORLD_SIZE" not in os.environ:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                *(TextColumn("round"), MofNCompleteColumn(), BarColumn(16)),  # all fits into 80 columns
                *(TextColumn("{task.description}"), TimeRemainingColumn()),
            )
            self._bar.start()
            self._task = self._bar.add_task(f"{clients} clients here", total=rounds, completed=done)

    def round_done(self, row: Row) -> None:
        means = {name: row[key]["mean"] for name, key in SHOWN.items()}
        measured = [f"{name} {_percent(mean)}" for name, mean in means.items() if mean is not None]
        loss = "-" if row["train_loss"] is None else f"{row['train_loss']:.4f}"
        each = (time.monotonic() - self._started) / (row["round"] - self._first)
        left = timedelta(seconds=round(each * (self._rounds - row["round"])))
        time_told = f"{row['seconds']['total']:.2f} s, {left} left"
        line = "  ".join([f"round {row['round']}/{self._rounds}", *measured, f"loss {loss}", time_told])
        LOGGER.info(line)
        if self._bar:
            if measured:
                self._shown = f"accuracy {_percent(means['accuracy'])}, "
            description = f"{self._shown}{self._clients} clients here"
            self._bar.update(self._task, completed=row["round"], description=description)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def table(federation: Federation, history: Sequence[Row]) -> str:
    """Per client: architecture, training samples, classes, accuracy; then last and best round."""
    from rich.console import Console
    from rich.table import Table

    last = history[-1]
    task = federation.task
    binary = last["auc"]["mean"] is not None
    shown = Table(title=f"clients after round {last['round']}")
    for heading in (
        "client",
        "architecture",
        "samples",
        "classes",
        "accuracy",
        *(["AUC"] if binary else []),
        "α shared",
    ):
        shown.add_column(heading, justify="right")
    for k in range(task.clients):
        alpha, auc = last["clients"]["alpha"][k], last["clients"]["auc"][k]
        ranked = ["-" if auc is None else f"{auc:.3f}"] if binary else []
        shown.add_row(
            *(str(k), task.architecture(k), str(task.samples(k)), str(int((task.counts[k] > 0).sum()))),
            *(_percent(last["clients"]["accuracy"][k]), *ranked, "-" if alpha is None else f"{alpha:.3f}"),
        )
    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        console.print(shown)
    lines = [capture.get().rstrip(), "last  " + _line(last)]
    top = best(history)
    if last["drift"]:
        lost, rounds = last["drift"]["forgetting"], last["drift"]["recovery"]
        recovery = "not recovered yet" if rounds is None else f"recovered after {rounds} rounds"
        lines.append(f"drift: {_percent(lost)} of the old concept forgotten, {recovery}")
    for key, why in (("dropped", "not finite"), ("lost", "lost"), ("late", "after the deadline")):
        count = Counter(client for row in history for client in row.get(key, []))
        if count:
            listed = ", ".join(f"{client} ({times} ×)" for client, times in sorted(count.items()))
            lines.append(f"left out, {why}: client {listed}")
    return "\n".join(lines + ([f"best measured  {_line(top)}"] if top else []))


def _line(row: Row) -> str:
    a = row["accuracy"]
    return (
        f"round {row['round']}: accuracy mean {_percent(a['mean'])}, weighted {_percent(a['weighted'])}, "
        f"std {_percent(a['std'])}, worst {_percent(a['worst'])}"
    )
