"""The section of one run's page about its models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pfedmoe_mpi.report.document import Section
from pfedmoe_mpi.report.drawing import WIDTH, Figure, Paint, is_narrow, legend_above, panels, style
from pfedmoe_mpi.report.model_views import EXTREMES, ModelViews
from pfedmoe_mpi.report.names import NO_NAMES, Names
from pfedmoe_mpi.report.run_figures import per_cent, short_name, sorted_clients
from pfedmoe_mpi.report.tables import (
    Cell,
    Column,
    Table,
    client_cells,
    client_columns,
    number,
    percent,
    word,
)

MOST_KINDS = 10  # classes or clients with a sign of their own
MEANING = {
    "r_G": "output of the shared extractor",
    "r_F": "output of the client's own extractor",
    "r": "input of the head",
}


def section(views: ModelViews, names: Names = NO_NAMES) -> Section:
    """Return samples with extreme gate weights, representations, and accuracies on a shared test set.

    Args:
        names: of clients and classes.
    """
    gated = views.alpha is not None
    contents = "gate weights and representations" if gated else "representations"
    drawn, samples = len(views.labels), f"{views.samples:,} test samples"
    counts = f"all {samples}" if drawn == views.samples else f"{drawn:,} of the {samples}"
    text = f"The models after round {views.round}: {contents} of {counts}."
    figures = [generalisation(views, names)]
    figures += [pictures(views, names)] if gated and views.images else []
    figures += [plane(views, by, names) for by in ("class", "client") if views.shared]
    figures += [own_planes(views, names)] if views.private else []
    return Section("Models", [_shared(views), *([_extremes(views, names)] if gated else [])], figures, text)


def share(value: float) -> Cell:
    """Return an accuracy in per cent, a dash for NaN."""
    return percent(None if math.isnan(value) else float(value))


def shared_note(views: ModelViews) -> str:
    """Return the note that defines the shared test set."""
    return (
        f"shared test: the same {views.shared_rows:,} rows for every client, drawn from the test rows of all "
        f"clients; models after round {views.round}"
    )


def _shared(views: ModelViews) -> Table:
    """Summarise both accuracies over the clients that have both."""
    both = ~np.isnan(views.accuracy_own) & ~np.isnan(views.accuracy_shared)
    rows = []
    for name, values in (
        ("own test rows", views.accuracy_own[both]),
        ("shared test set", views.accuracy_shared[both]),
    ):
        summary = (values.mean(), values.min(), values.max()) if len(values) else (math.nan,) * 3
        rows.append([word(name), number(len(values)), *(share(float(value)) for value in summary)])
    columns = [Column("accuracy on", words=True), *map(Column, ("clients", "mean, %", "worst, %", "best, %"))]
    return Table("shared_test", "Generalisation", columns, rows, [shared_note(views)])


def _extremes(views: ModelViews, names: Names) -> Table:
    assert views.alpha is not None
    columns = [Column("α", words=True), Column("weight"), Column("class")]
    columns += [Column("class name", words=True)] if names.classes else []
    columns += client_columns(names.clients)
    rows = [
        [
            word(end),
            number(float(views.alpha[index]), "{:.4f}"),
            number(int(views.labels[index])),
            *([word(names.classes[views.labels[index]])] if names.classes else []),
            *client_cells(int(views.clients[index]), names.clients),
        ]
        for end, indices in zip(("highest", "lowest"), views.extremes, strict=True)
        for index in indices
    ]
    title = "Test samples with the highest and the lowest weight α of the shared expert"
    return Table("alpha_samples", title, columns, rows, open=not views.images)


def pictures(views: ModelViews, names: Names) -> Figure:
    """Show the samples with the highest and the lowest gate weights."""

    def draw(canvas: Any, paint: Paint) -> None:
        assert views.alpha is not None
        lines = 2 if is_narrow(canvas) else 1  # of each kind of samples
        grid = canvas.subplots(2 * lines, EXTREMES // lines, squeeze=False)
        for half, indices in zip((grid[:lines], grid[lines:]), views.extremes, strict=True):
            for axes in half.flat:
                axes.set_axis_off()
            for axes, index in zip(half.flat, indices, strict=False):
                axes.imshow(views.picture(index), cmap="gray", vmin=0, vmax=1, interpolation="none")
                said = (f"α {views.alpha[index]:.3f}", short_name(names.class_of(int(views.labels[index]))))
                client = short_name(names.client(int(views.clients[index])))
                axes.set_title("\n".join((*said, client)), fontsize=7, loc="left")

    caption = (
        "Test samples with the highest (above) and the lowest (below) weight α of the shared expert, each "
        "with its class and the client whose gate weighted it."
    )
    return Figure("alpha_samples", "Samples with extreme gate weights", caption, draw, (WIDTH, 2.7), panels=2)


def plane(views: ModelViews, by: str, names: Names) -> Figure:
    """Plot the representations that all clients have in common in the plane, by class or by client."""
    values = views.labels if by == "class" else views.clients

    def draw(canvas: Any, paint: Paint) -> None:
        all_axes = panels(canvas, [1] * len(views.shared))
        for axes, (name, points) in zip(all_axes, views.embeddings.items(), strict=True):
            _scatter(axes, points, values, _kinds(values, by, names), paint)
            axes.set_title(name)
        legend_above(canvas, all_axes[0], 5)

    caption = f"{_meanings(views.shared)}, of the test samples by {by}, in the plane by {views.method}."
    if len(np.unique(values)) > MOST_KINDS:
        caption += f" Grey: all but the {MOST_KINDS} with the most samples."
    count = len(views.shared)
    return Figure(
        f"representations_{by}",
        f"Representations by {by}",
        caption,
        draw,
        (WIDTH, 3.8 if count == 1 else 3.0),
        panels=count,
    )


def own_planes(views: ModelViews, names: Names) -> Figure:
    """Plot the representations that involve a client's own extractor: one plane per client."""
    cells = list(views.own_embeddings)
    rows = len(cells) // len(views.drawn_clients)

    def draw(canvas: Any, paint: Paint) -> None:
        if is_narrow(canvas):
            grid = canvas.subplots(-(-len(cells) // 2), 2, squeeze=False)
        else:
            grid = canvas.subplots(rows, len(views.drawn_clients), squeeze=False)
        kinds = _kinds(views.labels, "class", names)
        for axes in grid.flat[len(cells) :]:
            axes.set_axis_off()
        for axes, (name, client) in zip(grid.flat, cells, strict=False):
            labels = views.labels[views.rows_of(client)]
            _scatter(axes, views.own_embeddings[name, client], labels, kinds, paint)
            axes.set_title(f"{name}, {short_name(names.client(client))}", fontsize=8)
        legend_above(canvas, grid.flat[0], 5)

    meanings = _meanings(list(dict.fromkeys(name for name, _ in cells)))
    count = len(views.drawn_clients)
    all_drawn = count == len(np.unique(views.clients))
    whose = "every client" if all_drawn else f"the {count} clients with the most samples"
    caption = (
        f"{meanings}, of {whose}, by class of the test samples, in the plane by {views.own_method}. Each "
        "client has a plane of its own: the outputs of two clients' extractors have no common coordinates."
    )
    if len(np.unique(views.labels)) > MOST_KINDS:
        caption += f" Grey: all but the {MOST_KINDS} classes with the most samples."
    size = (WIDTH, 0.5 + 1.7 * rows)
    return Figure("representations_own", "Representations of single clients", caption, draw, size, panels=2)


def _meanings(labels: Sequence[str]) -> str:
    """Return the labels with what they stand for."""
    return " and ".join(f"{label} ({MEANING[label]})" if label in MEANING else label for label in labels)


def _kinds(values: np.ndarray, by: str, names: Names) -> dict[int, str]:
    """Return the legend: the classes or clients with the most samples, in order; -1 stands for the others."""
    numbers, counts = np.unique(values, return_counts=True)
    most = numbers[np.argsort(-counts, kind="stable")[:MOST_KINDS]]
    kinds = {
        int(value): short_name(names.client(int(value)) if by == "client" else names.class_of(int(value)))
        for value in np.sort(most)
    }
    return kinds if len(kinds) == len(numbers) else {**kinds, -1: "others"}


def _scatter(
    axes: Any, points: np.ndarray, values: np.ndarray, kinds: Mapping[int, str], paint: Paint
) -> None:
    """Plot points of a plane, (n, 2), with a sign for each kind of value; the others are small and grey."""
    others = ~np.isin(values, list(kinds))
    for position, (value, label) in enumerate(kinds.items()):
        look = {**style(position, paint).dots(), "markersize": 4, "alpha": 0.85}
        if value < 0:
            look |= {"color": paint.ink, "marker": ".", "markersize": 3, "alpha": 0.4, "zorder": 1}
        shown = others if value < 0 else values == value
        axes.plot(*points[shown].T, label=label, markeredgewidth=0, **look)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set(visible=True, color=paint.grid)
    axes.margins(0.06)


def generalisation(views: ModelViews, names: Names) -> Figure:
    """Plot every client's accuracy on its own test rows and on the shared test set."""

    def draw(canvas: Any, paint: Paint) -> None:
        axes = canvas.subplots()
        order = np.lexsort((views.accuracy_shared, np.nan_to_num(views.accuracy_own, nan=2.0)))
        x = np.arange(len(order))
        own, shared = per_cent(views.accuracy_own)[order], per_cent(views.accuracy_shared)[order]
        axes.vlines(x, own, shared, color=paint.grid, linewidth=1)
        for series, (name, values) in enumerate((("own test rows", own), ("shared test set", shared))):
            axes.plot(x, values, label=name, **style(series, paint).dots())
        labels = [names.clients[k] if names.clients else str(k) for k in order]
        sorted_clients(canvas, axes, labels, "own test accuracy")
        axes.set_ylabel("test accuracy, %")
        legend_above(canvas, axes)

    caption = (
        f"Accuracy of every client's model after round {views.round} on its own test rows and on the shared "
        f"test set: the same {views.shared_rows:,} rows for every client, drawn from all clients' test rows."
    )
    return Figure("generalisation", "Generalisation", caption, draw, (WIDTH, 3.0))
