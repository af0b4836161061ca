"""The part of one run's page about classes: metrics by class, and which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pfedmoe_mpi.report.document import Section
from pfedmoe_mpi.report.drawing import COLOR_MAP, WIDTH, Figure, Paint, is_narrow
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.run_figures import short_name
from pfedmoe_mpi.report.tables import Cell, Column, Table, client_cells, client_columns, number, percent, word

if TYPE_CHECKING:
    from pfedmoe_mpi.checkpoint.confusion import Confusion

DRAWN = 11  # clients of which a matrix is drawn, beside that of all together
MOST_TICKS = 20  # classes whose names fit along a matrix
FEW_CELLS = 10  # classes of a matrix that shows its numbers
IN_TEXT = 3  # mistakes in the sentence above
TITLES = {
    "accuracy": "accuracy, %",
    "macro_f1": "macro-F1, %",
    "balanced_accuracy": "balanced accuracy, %",
    "accuracy_tuned": "tuned, %",
}


def section(run: Run) -> Section:
    """Return metrics beside accuracy by client, and the mistakes of the last evaluation where they are kept.

    Empty for runs of an earlier version.
    """
    metrics = [_metrics(run)] if run.selected.get("macro_f1") else []
    found = run.confusion
    order = _worst_first(run, found) if found else []
    if found is None or not order:
        return Section("By class", metrics)
    table, text = _table(run, found, order)
    tables = [table, *metrics] if table.rows else metrics
    return Section("By class", tables, [figure(run, found, order[:DRAWN])], text)


def _metrics(run: Run) -> Table:
    """List what accuracy alone hides of every client."""
    clients = run.selected["clients"]
    columns = [*client_columns(run.client_names), Column("test samples")]
    shown = {
        name: title for name, title in TITLES.items() if any(v is not None for v in clients.get(name) or ())
    }
    columns += map(Column, shown.values())
    rows = [
        [
            *client_cells(k, run.client_names),
            number(clients["test_samples"][k]),
            *(percent(clients[name][k]) for name in shown),
        ]
        for k in range(run.clients)
    ]
    notes = [
        "macro-F1: mean over classes in a client's test rows or answers; balanced accuracy: over classes in "
        "its test rows; tuned: of a client that never trains, after unseen.tune epochs"
    ]
    title = f"Metrics by client, round {run.selected['round']}"
    return Table("client_metrics", title, columns, rows, notes, open=False)


def _worst_first(run: Run, found: Confusion) -> list[int]:
    """Return the clients with test rows that have trained, from the largest share of mistakes on."""
    absent = run.absent_clients(found.round)
    shares = {}
    for client in range(found.clients):
        counts = found.client(client)
        if counts.any() and client not in absent:
            shares[client] = 1 - np.trace(counts) / counts.sum()
    return sorted(shares, key=lambda client: (-shares[client], client))


def _table(run: Run, found: Confusion, order: Sequence[int]) -> tuple[Table, str]:
    """Return every client's most frequent mistake, and the first of them as a sentence."""
    rows: list[list[Cell]] = []
    said: list[str] = []
    for client in order:
        counts = found.client(client)
        wrong = counts - np.diag(np.diag(counts))
        if not wrong.any():
            continue
        label, answer = (int(n) for n in np.unravel_index(wrong.argmax(), wrong.shape))
        times, of, mistakes = int(wrong[label, answer]), int(counts[label].sum()), int(wrong.sum())
        classes = (_class_name(run, label), _class_name(run, answer))
        cells = [word(name) for name in classes] + [number(n) for n in (times, of, mistakes)]
        share = percent(1 - mistakes / int(counts.sum()))
        rows.append([*client_cells(client, run.client_names), *cells, share])
        if len(said) < IN_TEXT:
            said.append(
                f"{run.names.client(client)}: {classes[0]} taken for {classes[1]} ({times} of {of} rows)"
            )
    columns = [
        *client_columns(run.client_names),
        Column("class", words=True),
        Column("taken for", words=True),
    ]
    columns += [*map(Column, ("rows", "of the class", "mistakes of the client", "accuracy, %"))]
    title = f"Each client's most frequent mistake, round {found.round}"
    notes = ["clients with the largest share of mistakes first; clients without mistakes are left out"]
    start = "Most often confused by the clients with the largest share of mistakes"
    text = f"{start}: {'; '.join(said)}." if said else ""
    return Table("mistakes", title, columns, rows, notes, open=len(rows) <= 20), text


def _class_name(run: Run, label: int) -> str:
    return run.class_names[label] if run.class_names else str(label)


def figure(run: Run, found: Confusion, clients: Sequence[int]) -> Figure:
    """Draw the confusion matrix of all clients together, and those of some clients."""
    total = np.zeros((found.classes, found.classes), np.int64)
    np.add.at(total.reshape(-1), found.place % total.size, found.count)
    drawn = [("all clients", total), *((run.names.client(k), found.client(k)) for k in clients)]

    def draw(canvas: Any, paint: Paint) -> None:
        across = 2 if is_narrow(canvas) else 4
        grid = canvas.subplots(-(-len(drawn) // across), across, squeeze=False)
        for axes in grid.flat[len(drawn) :]:
            axes.set_axis_off()
        for axes, (name, counts) in zip(grid.flat, drawn, strict=False):
            _matrix(axes, counts, [_class_name(run, label) for label in range(found.classes)])
            axes.set_title(short_name(name), fontsize=8)
        for axes in grid[:, 0]:
            axes.set_ylabel("class", fontsize=8)
        for axes in grid[-1]:
            axes.set_xlabel("taken for", fontsize=8)

    which = "every client" if len(clients) == found.clients else f"the {len(clients)} clients with the most"
    caption = (
        f"How often test rows of each class (down) were taken for each class (across) after round "
        f"{found.round}: all clients together, and {which}, by share of mistakes. The shade is the share of "
        "the class; the diagonal is right; empty rows have no test rows."
    )
    height = 0.5 + 1.7 * -(-len(drawn) // 4)
    return Figure("confusion", "Confusion matrices", caption, draw, (WIDTH, height), panels=2)


def _matrix(axes: Any, counts: np.ndarray, names: Sequence[str]) -> None:
    """Draw one matrix, shaded by the share of the row's class."""
    rows = counts.sum(axis=1, keepdims=True)
    shares = np.where(rows > 0, counts / np.maximum(rows, 1), np.nan)
    axes.imshow(shares, cmap=COLOR_MAP, vmin=0, vmax=1, interpolation="none")
    axes.grid(visible=False)
    if len(names) <= MOST_TICKS:
        most = max(3, 40 // len(names))  # characters
        shown = [name if len(name) <= most + 1 else f"{name[:most]}…" for name in names]
        axes.set_xticks(range(len(names)), shown, fontsize=5, rotation=90 if max(map(len, shown)) > 2 else 0)
        axes.set_yticks(range(len(names)), shown, fontsize=5)
    if len(names) <= FEW_CELLS:
        for (label, answer), count in np.ndenumerate(counts):
            if count:
                light = shares[label, answer] < 0.55
                color = "white" if light else "black"
                axes.text(answer, label, str(count), ha="center", va="center", fontsize=4.5, color=color)
