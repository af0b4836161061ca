"""Figures of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pfedmoe_mpi.report.costs import traffic
from pfedmoe_mpi.report.drawing import COLOR_MAP, WIDTH, Figure, Paint, style
from pfedmoe_mpi.report.load import Run

BAND = (10, 90)  # percentiles of the clients
FEW_CELLS = 300  # of a heat map that shows its numbers


def column(run: Run, name: str) -> np.ndarray:
    """Return a client metric, (rounds, N), NaN where not measured and for clients that had not trained."""
    table = np.array([row["clients"][name] for row in run.history], float)
    for number, row in enumerate(run.history):
        table[number, sorted(run.absent_clients(row["round"]))] = np.nan
    return table


def measured(rounds: Sequence[int], values: Sequence[float | None]) -> tuple[list[int], list[float]]:
    """Return rounds and values without those that are None."""
    kept = [(r, v) for r, v in zip(rounds, values, strict=True) if v is not None]
    return [r for r, _ in kept], [v for _, v in kept]


def per_cent(values: Any) -> np.ndarray:
    """Return shares in per cent."""
    return 100 * np.asarray(values, float)


def whole_numbers(axis: Any, most: int = 8) -> None:
    """Put ticks at whole numbers only, even if the axis has only one."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=most, min_n_ticks=1))


def rounds_axis(axes: Any) -> None:
    """Label the x axis as rounds."""
    whole_numbers(axes.xaxis)
    axes.set_xlabel("round")


def band(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return BAND's percentiles of each row, ignoring NaN; no row may be all NaN."""
    low, high = np.nanpercentile(table, BAND, axis=1)
    return low, high


def legend_above(canvas: Any, axes: Any, columns: int = 3) -> None:
    """Put a legend above the figure, where it covers no line."""
    handles, labels = axes.get_legend_handles_labels()
    canvas.legend(
        handles, labels, loc="outside upper left", ncols=columns, handlelength=2.8, columnspacing=1.2
    )


def convergence(run: Run) -> Figure:
    """Plot the accuracy of all clients after the sum, of the cohort before it, and the training loss."""

    def draw(canvas: Any, paint: Paint) -> None:
        left, right = canvas.subplots(1, 2, width_ratios=(3, 2))
        rounds = [row["round"] for row in run.history]
        table = column(run, "accuracy")
        measured_rounds = ~np.isnan(table).all(axis=1)
        first, second, third = (style(n, paint) for n in range(3))
        x = np.array(rounds)[measured_rounds]
        if len(x):
            low, high = band(per_cent(table[measured_rounds]))
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
        "Left: accuracy with the new shared state, mean over all clients, 10th to 90th percentile and worst "
        "client; accuracy of the round's cohort before the sum. Right: the training loss."
    )
    return Figure("convergence", "Convergence", caption, draw, (WIDTH, 3.4))


def clients(run: Run) -> Figure:
    """Plot the accuracy of the clients that have trained, last measured round, sorted and by architecture."""

    def draw(canvas: Any, paint: Paint) -> None:
        left, right = canvas.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        accuracy = per_cent(column(run, "accuracy")[run.history.index(run.last)])
        order = [k for k in np.argsort(accuracy) if not np.isnan(accuracy[k])]
        position = {client: number for number, client in enumerate(order, 1)}
        names = list(dict.fromkeys(run.architecture(k) for k in range(run.clients)))
        for number, name in enumerate(names):
            members = [k for k in order if run.architecture(k) == name]
            look = style(number, paint)
            left.plot([position[k] for k in members], accuracy[members], label=name, **look.dots())
            right.plot(np.full(len(members), number), accuracy[members], alpha=0.6, **look.dots())
            if members:
                right.hlines(
                    accuracy[members].mean(), number - 0.3, number + 0.3, color=paint.ink, linewidth=2
                )
        left.set_xticks([])  # ranks in the order, easily mistaken for the clients' numbers
        left.set_xlabel("clients, sorted")
        left.set_ylabel("test accuracy, %")
        legend_above(canvas, left, 5)
        right.set_xticks(range(len(names)), names, rotation=45 if sum(map(len, names)) > 24 else 0)
        right.set_xlim(-0.6, len(names) - 0.4)
        right.set_xlabel("architecture; bar: mean")
        right.grid(axis="x", visible=False)

    when = f"after round {run.last['round']}"
    caption = f"Test accuracy {when} of every client that has trained, sorted and by architecture."
    return Figure("clients", "Accuracy by client", caption, draw, (WIDTH, 3.2))


def heat_map(canvas: Any, axes: Any, table: np.ndarray, label: str, limits: tuple[float, float]) -> Any:
    """Draw a heat map with its colour bar, rows and columns by number; NaN stays empty."""
    image = axes.imshow(
        table, aspect="auto", cmap=COLOR_MAP, interpolation="none", vmin=limits[0], vmax=limits[1]
    )
    canvas.colorbar(image, ax=axes, label=label, pad=0.02)
    for axis in (axes.xaxis, axes.yaxis):
        whole_numbers(axis, 10)
    axes.grid(visible=False)
    return image


def partition(counts: np.ndarray) -> Figure:
    """Draw training samples, (N, classes), with classes down and clients across."""

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
    return Figure("partition", "Training samples by class and client", caption, draw, (WIDTH, height))


def seconds(run: Run) -> Figure:
    """Plot the time of each round by phase, on a logarithmic axis."""

    def draw(canvas: Any, paint: Paint) -> None:
        axes = canvas.subplots()
        rounds = [row["round"] for row in run.history]
        for number, name in enumerate(("total", "train", "evaluate", "sum", "wait", "write")):
            values = [row["seconds"].get(name) or None for row in run.history]
            if name == "evaluate":  # in rounds without an evaluation it is close to 0, far below on this axis
                values = [
                    s if row["accuracy"]["mean"] is not None else None
                    for s, row in zip(values, run.history, strict=True)
                ]
            x, y = measured(rounds, values)
            if not x:
                continue
            series_style = style(number, paint)
            kind = series_style.dots() if name == "write" else series_style.line(len(x))
            axes.plot(x, y, label=name, **kind)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylabel("seconds, maximum over ranks")
        rounds_axis(axes)
        legend_above(canvas, axes, 6)

    caption = "Seconds of each round by phase, maximum over ranks; wait: for the other ranks, before the sum."
    return Figure("seconds", "Time by phase", caption, draw)


def burden(run: Run) -> Figure:
    """Plot the bytes sent so far, and the memory."""

    def draw(canvas: Any, paint: Paint) -> None:
        left, right = canvas.subplots(1, 2)
        rounds = [row["round"] for row in run.history]
        by_round = traffic(run)
        parts: list[tuple[str, Callable[[Any], float]]] = [
            ("up", lambda sent: sent.up),
            ("down", lambda sent: sent.down),
            ("once", lambda sent: sent.once),
        ]
        for number, (name, part) in enumerate(parts):
            values = np.cumsum([part(sent) for sent in by_round]) / 1e6
            if values[-1] or name != "once":
                left.plot(rounds, values, label=name, **style(number, paint).line(len(rounds)))
        left.set_ylabel("MB sent so far")
        left.set_ylim(bottom=0)
        legend_above(canvas, left)
        x, y = measured(rounds, [row["rss_mb"] for row in run.history])
        right.plot(x, y, **style(0, paint).line(len(x)))
        right.set_ylim(0, 1.08 * max(y, default=1))
        right.set_ylabel("memory, largest rank, MiB")
        for axes in (left, right):
            rounds_axis(axes)

    caption = (
        "Left: megabytes that a deployment would have sent so far, summed over the cohort; once: sent when a "
        "client first joins a cohort. Right: memory of the rank that uses most."
    )
    return Figure("burden", "Bytes and memory", caption, draw, (WIDTH, 2.8))
