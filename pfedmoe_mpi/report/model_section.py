"""What is shown of the models of one run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pfedmoe_mpi.report.document import Section
from pfedmoe_mpi.report.drawing import WIDTH, Figure, Paint, style
from pfedmoe_mpi.report.model_views import EXTREMES, Looked
from pfedmoe_mpi.report.run_figures import legend_above, per_cent
from pfedmoe_mpi.report.tables import Cell, Column, Table, number, percent, word


def section(looked: Looked) -> Section:
    """Samples at both ends of the gate, representations, and everybody on one test set."""
    gated = looked.alpha is not None
    what = "gate weights and representations" if gated else "representations"
    counts = f"{len(looked.labels):,} of the {looked.samples:,} test samples"
    text = f"The models after round {looked.round}; {what} of {counts}."
    figures = [generalisation(looked)]
    figures += [pictures(looked)] if gated and looked.images else []
    figures += [plane(looked, "class"), plane(looked, "client")] if looked.representations else []
    return Section("Models", [_shared(looked), *([_extremes(looked)] if gated else [])], figures, text)


def share(value: float) -> Cell:
    """An accuracy in per cent; NaN is a dash."""
    return percent(None if math.isnan(value) else float(value))


def shared_note(looked: Looked) -> str:
    return (
        f"shared test: the same {looked.shared_rows:,} rows for everybody, out of the test rows of all "
        f"clients, with the models after round {looked.round}"
    )


def _shared(looked: Looked) -> Table:
    """Means over the clients that have both."""
    both = ~np.isnan(looked.own) & ~np.isnan(looked.shared)
    rows = []
    for name, values in (("own test rows", looked.own[both]), ("shared test set", looked.shared[both])):
        shown = (values.mean(), values.min(), values.max()) if len(values) else (math.nan,) * 3
        rows.append([word(name), number(len(values)), *(share(float(value)) for value in shown)])
    columns = [Column("accuracy on", words=True), *map(Column, ("clients", "mean, %", "worst, %", "best, %"))]
    return Table("shared_test", "Generalisation", columns, rows, [shared_note(looked)])


def _extremes(looked: Looked) -> Table:
    assert looked.alpha is not None
    columns = [Column("α", words=True), *map(Column, ("weight", "class", "client"))]
    rows = [
        [
            word(end),
            number(float(looked.alpha[place]), "{:.4f}"),
            number(int(looked.labels[place])),
            number(int(looked.clients[place])),
        ]
        for end, places in zip(("highest", "lowest"), looked.extremes, strict=True)
        for place in places
    ]
    title = "Test samples with the highest and the lowest weight α of the shared expert"
    return Table("alpha_samples", title, columns, rows, open=not looked.images)


def pictures(looked: Looked) -> Figure:
    """The samples at both ends of the gate."""

    def draw(canvas: Any, paint: Paint) -> None:
        assert looked.alpha is not None
        grid = canvas.subplots(2, EXTREMES, squeeze=False)
        for row, places in zip(grid, looked.extremes, strict=True):
            for axes in row:
                axes.set_axis_off()
            for axes, place in zip(row, places, strict=False):
                axes.imshow(looked.picture(place), cmap="gray", vmin=0, vmax=1, interpolation="none")
                words = (f"α {looked.alpha[place]:.3f}", f"class {looked.labels[place]}")
                axes.set_title("\n".join((*words, f"client {looked.clients[place]}")), fontsize=7, loc="left")

    caption = (
        "Test samples with the highest (above) and the lowest (below) weight α of the shared expert, each "
        "with its class and the client whose gate decided."
    )
    return Figure("alpha_samples", "Samples at both ends of the gate", caption, draw, (WIDTH, 2.7))


def plane(looked: Looked, by: str) -> Figure:
    """Representations in the plane; every sample is written as the number of its class, or its client."""
    numbers = looked.labels if by == "class" else looked.clients

    def draw(canvas: Any, paint: Paint) -> None:
        embeddings = looked.embeddings
        grid = canvas.subplots(1, len(embeddings), squeeze=False)[0]
        for axes, (name, places) in zip(grid, embeddings.items(), strict=True):
            for value in np.unique(numbers):
                outline, wide = glyph(int(value))
                look = {"color": style(int(value), paint).color, "marker": outline, "markeredgewidth": 0}
                axes.plot(*places[numbers == value].T, linestyle="none", markersize=4.5 * wide, **look)
            axes.set_title(name)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
            axes.spines[:].set(visible=True, color=paint.grid)
            axes.margins(0.04)

    how = f"{looked.method} of {', '.join(looked.representations)}"
    meaning = {
        "r_G": "the shared extractor's",
        "r_F": "the client's own extractor's",
        "r": "what the head gets",
    }
    known = [f"{name}: {meaning[name]}" for name in looked.representations if name in meaning]
    caption = f"{how}; every test sample is written as the number of its {by}. {'; '.join(known)}".rstrip()
    return Figure(
        f"representations_{by}",
        f"Representations by {by}",
        caption,
        draw,
        (WIDTH, 3.4 if len(looked.representations) == 1 else 2.6),
    )


def glyph(value: int) -> tuple[Any, float]:
    """A number as a marker: its outline about the origin, and how much wider than high, at least 1."""
    from matplotlib.path import Path
    from matplotlib.textpath import TextPath

    outline = TextPath((0, 0), str(value), size=1)
    low, high = outline.vertices.min(axis=0), outline.vertices.max(axis=0)
    wide, tall = high - low
    return Path((outline.vertices - (low + high) / 2) / tall, outline.codes), max(1.0, wide / tall)


def generalisation(looked: Looked) -> Figure:
    """Every client's accuracy on its own test rows and on the shared ones."""

    def draw(canvas: Any, paint: Paint) -> None:
        axes = canvas.subplots()
        order = np.lexsort((looked.shared, np.nan_to_num(looked.own, nan=2.0)))
        x = np.arange(1, len(order) + 1)
        own, shared = per_cent(looked.own)[order], per_cent(looked.shared)[order]
        axes.vlines(x, own, shared, color=paint.grid, linewidth=1)
        for which, (name, values) in enumerate((("own test rows", own), ("shared test set", shared))):
            axes.plot(x, values, label=name, **style(which, paint).dots())
        axes.set_xticks([])
        axes.set_xlabel("clients, sorted by the accuracy on their own test rows")
        axes.set_ylabel("test accuracy, %")
        legend_above(canvas, axes)

    caption = (
        f"Accuracy of every client's model after round {looked.round} on its own test rows, and on the same "
        f"{looked.shared_rows:,} rows of all clients and classes for everybody."
    )
    return Figure("generalisation", "Generalisation", caption, draw, (WIDTH, 3.0))
