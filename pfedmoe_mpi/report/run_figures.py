"""The figures of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pfedmoe_mpi.report.costs import traffic
from pfedmoe_mpi.report.drawing import MAP, WIDTH, Figure, Paint, style
from pfedmoe_mpi.report.load import Run

BAND = (10, 90)  # percentiles of the clients
FEW_CELLS = 300  # of a heat map: numbers are written into it


def column(run: Run, name: str) -> np.ndarray:
    """(rounds, N) of a client metric, NaN where it was not measured and for clients that had not trained."""
    table = np.array([row["clients"][name] for row in run.history], float)
    for number, row in enumerate(run.history):
        table[number, sorted(run.absent(row["round"]))] = np.nan
    return table


def measured(rounds: Sequence[int], values: Sequence[float | None]) -> tuple[list[int], list[float]]:
    """Both without the rounds that have no value."""
    kept = [(r, v) for r, v in zip(rounds, values, strict=True) if v is not None]
    return [r for r, _ in kept], [v for _, v in kept]


def per_cent(values: Any) -> np.ndarray:
    return 100 * np.asarray(values, float)


def whole_numbers(axis: Any, most: int = 8) -> None:
    """Along an axis, whose only number may be one."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=most, min_n_ticks=1))


def rounds_axis(axes: Any) -> None:
    whole_numbers(axes.xaxis)
    axes.set_xlabel("round")


def band(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """BAND's percentiles of each row without its NaN; rows that are all NaN are not given."""
    low, high = np.nanpercentile(table, BAND, axis=1)
    return low, high


def legend_above(canvas: Any, axes: Any, columns: int = 3) -> None:
    """A legend over the whole figure, where it covers no line."""
    handles, labels = axes.get_legend_handles_labels()
    canvas.legend(
        handles, labels, loc="outside upper left", ncols=columns, handlelength=2.8, columnspacing=1.2
    )


def convergence(run: Run) -> Figure:
    """Accuracy of all clients after the sum, of the cohort before it, and the training loss."""

    def draw(canvas: Any, paint: Paint) -> None:
        left, right = canvas.subplots(1, 2, width_ratios=(3, 2))
        rounds = [row["round"] for row in run.history]
        table = column(run, "accuracy")
        known = ~np.isnan(table).all(axis=1)
        first, second, third = (style(n, paint) for n in range(3))
        x = np.array(rounds)[known]
        if len(x):
            low, high = band(per_cent(table[known]))
            left.fill_between(
                x, low, high, color=first.color, alpha=0.2, linewidth=0, label="80 % of the clients"
            )
            x, y = measured(rounds, [row["accuracy"]["mean"] for row in run.history])
            left.plot(x, per_cent(y), label="mean of clients", **first.line(len(x)))
            x, y = measured(rounds, [row["accuracy_cohort"]["mean"] for row in run.history])
            left.plot(x, per_cent(y), label="cohort, before the sum", **second.line(len(x)))
            x, y = measured(rounds, [row["accuracy"]["worst"] for row in run.history])
            left.plot(x, per_cent(y), label="worst client", **third.line(len(x)))
            legend_above(canvas, left, 4)
        left.set_ylabel("test accuracy, %")
        x, y = measured(rounds, [row["train_loss"] for row in run.history])
        right.plot(x, y, **first.line(len(x)))
        right.set_ylabel("training loss")
        for axes in (left, right):
            rounds_axis(axes)

    caption = (
        "Mean accuracy over all clients with the new shared state, and the 10th to 90th percentile; "
        "that of the round's cohort before the sum; the worst client. Right: what training minimises."
    )
    return Figure("convergence", "Convergence", caption, draw, (WIDTH, 3.4))


def clients(run: Run) -> Figure:
    """The accuracy of every client that trains in the last measured round: sorted, and by architecture."""

    def draw(canvas: Any, paint: Paint) -> None:
        left, right = canvas.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        accuracy = per_cent(column(run, "accuracy")[run.history.index(run.last)])
        order = [k for k in np.argsort(accuracy) if not np.isnan(accuracy[k])]
        place = {client: number for number, client in enumerate(order, 1)}
        names = list(dict.fromkeys(run.architecture(k) for k in range(run.clients)))
        for number, name in enumerate(names):
            own = [k for k in order if run.architecture(k) == name]
            look = style(number, paint)
            left.plot([place[k] for k in own], accuracy[own], label=name, **look.dots())
            right.plot(np.full(len(own), number), accuracy[own], alpha=0.6, **look.dots())
            if own:
                right.hlines(accuracy[own].mean(), number - 0.3, number + 0.3, color=paint.ink, linewidth=2)
        left.set_xticks([])  # places, which would be taken for the clients' numbers
        left.set_xlabel("clients, sorted")
        left.set_ylabel("test accuracy, %")
        legend_above(canvas, left, 5)
        right.set_xticks(range(len(names)), names, rotation=45 if sum(map(len, names)) > 24 else 0)
        right.set_xlim(-0.6, len(names) - 0.4)
        right.set_xlabel("architecture; bar: mean")
        right.grid(axis="x", visible=False)

    when = f"after round {run.last['round']}"
    caption = f"Test accuracy of every client that trains, {when}, sorted and by architecture."
    return Figure("clients", "Accuracy by client", caption, draw, (WIDTH, 3.2))


def heat_map(canvas: Any, axes: Any, table: np.ndarray, label: str, limits: tuple[float, float]) -> Any:
    """Cells with a bar that explains them; cells without a value stay empty. Rows and columns by number."""
    image = axes.imshow(table, aspect="auto", cmap=MAP, interpolation="none", vmin=limits[0], vmax=limits[1])
    canvas.colorbar(image, ax=axes, label=label, pad=0.02)
    for axis in (axes.xaxis, axes.yaxis):
        whole_numbers(axis, 10)
    axes.grid(visible=False)
    return image


def partition(counts: np.ndarray) -> Figure:
    """Training samples per class (down) and client (across), (N, classes)."""

    def draw(canvas: Any, paint: Paint) -> None:
        axes = canvas.subplots()
        table = np.where(counts.T > 0, counts.T, np.nan).astype(float)
        image = heat_map(canvas, axes, table, "training samples", (0, max(1, counts.max())))
        axes.set_xlabel("client")
        axes.set_ylabel("class")
        if counts.size <= FEW_CELLS:
            for (label, client), value in np.ndenumerate(table):
                if not np.isnan(value):
                    dark = image.norm(value) < 0.55
                    axes.text(
                        client,
                        label,
                        f"{value:.0f}",
                        ha="center",
                        va="center",
                        fontsize=6,
                        color="white" if dark else "black",
                    )

    height = min(6.0, max(2.2, 0.22 * counts.shape[1] + 0.8))
    caption = "Training samples of each client by class; empty where a client has none."
    return Figure("partition", "Who holds which classes", caption, draw, (WIDTH, height))


def seconds(run: Run) -> Figure:
    """Where the time of a round went, on a logarithmic axis."""

    def draw(canvas: Any, paint: Paint) -> None:
        axes = canvas.subplots()
        rounds = [row["round"] for row in run.history]
        for number, name in enumerate(("total", "train", "evaluate", "sum", "wait", "write")):
            spent = [row["seconds"].get(name) or None for row in run.history]
            if name == "evaluate":  # the other rounds have a moment of it, far below on this axis
                spent = [
                    s if row["accuracy"]["mean"] is not None else None
                    for s, row in zip(spent, run.history, strict=True)
                ]
            x, y = measured(rounds, spent)
            if not x:
                continue
            look = style(number, paint)
            kind = look.dots() if name == "write" else look.line(len(x))
            axes.plot(x, y, label=name, **kind)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylabel("seconds, largest over ranks")
        rounds_axis(axes)
        legend_above(canvas, axes, 6)

    caption = "Seconds of each round by what they went into, the largest over ranks; wait is for other ranks."
    return Figure("seconds", "Where the time went", caption, draw)


def burden(run: Run) -> Figure:
    """Bytes sent so far, and memory."""

    def draw(canvas: Any, paint: Paint) -> None:
        left, right = canvas.subplots(1, 2)
        rounds = [row["round"] for row in run.history]
        sent = traffic(run)
        parts: list[tuple[str, Callable[[Any], float]]] = [
            ("up", lambda found: found.up),
            ("down", lambda found: found.down),
            ("once", lambda found: found.once),
        ]
        for number, (name, part) in enumerate(parts):
            values = np.cumsum([part(found) for found in sent]) / 1e6
            if values[-1] or name != "once":
                left.plot(rounds, values, label=name, **style(number, paint).line(len(rounds)))
        left.set_ylabel("MB sent so far")
        left.set_ylim(bottom=0)
        legend_above(canvas, left)
        x, y = measured(rounds, [row["rss_mb"] for row in run.history])
        right.plot(x, y, **style(0, paint).line(len(x)))
        right.set_ylim(0, 1.08 * max(y, default=1))
        right.set_ylabel("largest rank, MiB")
        for axes in (left, right):
            rounds_axis(axes)

    caption = (
        "Bytes that a deployment would have sent, all members together, and the memory of the largest rank."
    )
    return Figure("burden", "Bytes and memory", caption, draw, (WIDTH, 2.8))
