"""The section of one run's page about its models."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pfedmoe_mpi.report.document import Section
from pfedmoe_mpi.report.drawing import WIDTH, Figure, Paint, style
from pfedmoe_mpi.report.model_views import EXTREMES, ModelViews
from pfedmoe_mpi.report.run_figures import legend_above, per_cent
from pfedmoe_mpi.report.tables import Cell, Column, Table, number, percent, word


def section(views: ModelViews) -> Section:
    """Return samples with extreme gate weights, representations, and accuracies on a shared test set."""
    gated = views.alpha is not None
    contents = "gate weights and representations" if gated else "representations"
    counts = f"{len(views.labels):,} of the {views.samples:,} test samples"
    text = f"The models after round {views.round}: {contents} for {counts}."
    figures = [generalisation(views)]
    figures += [pictures(views)] if gated and views.images else []
    figures += [plane(views, "class"), plane(views, "client")] if views.representations else []
    return Section("Models", [_shared(views), *([_extremes(views)] if gated else [])], figures, text)


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


def _extremes(views: ModelViews) -> Table:
    assert views.alpha is not None
    columns = [Column("α", words=True), *map(Column, ("weight", "class", "client"))]
    rows = [
        [
            word(end),
            number(float(views.alpha[index]), "{:.4f}"),
            number(int(views.labels[index])),
            number(int(views.clients[index])),
        ]
        for end, indices in zip(("highest", "lowest"), views.extremes, strict=True)
        for index in indices
    ]
    title = "Test samples with the highest and the lowest weight α of the shared expert"
    return Table("alpha_samples", title, columns, rows, open=not views.images)


def pictures(views: ModelViews) -> Figure:
    """Show the samples with the highest and the lowest gate weights."""

    def draw(canvas: Any, paint: Paint) -> None:
        assert views.alpha is not None
        grid = canvas.subplots(2, EXTREMES, squeeze=False)
        for row, indices in zip(grid, views.extremes, strict=True):
            for axes in row:
                axes.set_axis_off()
            for axes, index in zip(row, indices, strict=False):
                axes.imshow(views.picture(index), cmap="gray", vmin=0, vmax=1, interpolation="none")
                lines = (f"α {views.alpha[index]:.3f}", f"class {views.labels[index]}")
                axes.set_title("\n".join((*lines, f"client {views.clients[index]}")), fontsize=7, loc="left")

    caption = (
        "Test samples with the highest (above) and the lowest (below) weight α of the shared expert, each "
        "with its class and the client whose gate weighted it."
    )
    return Figure("alpha_samples", "Samples with extreme gate weights", caption, draw, (WIDTH, 2.7))


def plane(views: ModelViews, by: str) -> Figure:
    """Plot representations in the plane; each sample's marker is the number of its class or its client."""
    numbers = views.labels if by == "class" else views.clients

    def draw(canvas: Any, paint: Paint) -> None:
        embeddings = views.embeddings
        grid = canvas.subplots(1, len(embeddings), squeeze=False)[0]
        for axes, (name, points) in zip(grid, embeddings.items(), strict=True):
            for value in np.unique(numbers):
                outline, width = glyph(int(value))
                look = {"color": style(int(value), paint).color, "marker": outline, "markeredgewidth": 0}
                axes.plot(*points[numbers == value].T, linestyle="none", markersize=4.5 * width, **look)
            axes.set_title(name)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
            axes.spines[:].set(visible=True, color=paint.grid)
            axes.margins(0.04)

    method = f"{views.method} of {', '.join(views.representations)}"
    meaning = {
        "r_G": "output of the shared extractor",
        "r_F": "output of the client's own extractor",
        "r": "input of the head",
    }
    legend = "; ".join(f"{name}: {meaning[name]}" for name in views.representations if name in meaning)
    caption = f"{method}; the marker of each test sample is the number of its {by}. {legend}".rstrip()
    return Figure(
        f"representations_{by}",
        f"Representations by {by}",
        caption,
        draw,
        (WIDTH, 3.4 if len(views.representations) == 1 else 2.6),
    )


def glyph(value: int) -> tuple[Any, float]:
    """Return a number as a marker: its centred outline, and its ratio of width to height, at least 1."""
    from matplotlib.path import Path
    from matplotlib.textpath import TextPath

    outline = TextPath((0, 0), str(value), size=1)
    low, high = outline.vertices.min(axis=0), outline.vertices.max(axis=0)
    width, height = high - low
    return Path((outline.vertices - (low + high) / 2) / height, outline.codes), max(1.0, width / height)


def generalisation(views: ModelViews) -> Figure:
    """Plot every client's accuracy on its own test rows and on the shared test set."""

    def draw(canvas: Any, paint: Paint) -> None:
        axes = canvas.subplots()
        order = np.lexsort((views.accuracy_shared, np.nan_to_num(views.accuracy_own, nan=2.0)))
        x = np.arange(1, len(order) + 1)
        own, shared = per_cent(views.accuracy_own)[order], per_cent(views.accuracy_shared)[order]
        axes.vlines(x, own, shared, color=paint.grid, linewidth=1)
        for series, (name, values) in enumerate((("own test rows", own), ("shared test set", shared))):
            axes.plot(x, values, label=name, **style(series, paint).dots())
        axes.set_xticks([])
        axes.set_xlabel("clients, sorted by the accuracy on their own test rows")
        axes.set_ylabel("test accuracy, %")
        legend_above(canvas, axes)

    caption = (
        f"Accuracy of every client's model after round {views.round} on its own test rows and on the shared "
        f"test set: the same {views.shared_rows:,} rows for every client, drawn from all clients' test rows."
    )
    return Figure("generalisation", "Generalisation", caption, draw, (WIDTH, 3.0))
