"""Figures of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pfedmoe_mpi.report import distributions
from pfedmoe_mpi.report.costs import traffic
from pfedmoe_mpi.report.drawing import COLOR_MAP, WIDTH, Figure, Paint, legend_above, panels, style
from pfedmoe_mpi.report.load import Run, numbers

BAND = (10, 90)  # percentiles of the clients
FEW_CELLS = 300  # of a heat map that shows its numbers
LABEL_SIZE = 7  # points; of clients' names
LONGEST_LABEL = 14  # characters of a client's name in a figure


def column(run: Run, name: str) -> np.ndarray:
    """Return a client metric, (rounds, N), NaN where not measured and for clients that had not trained."""
    table = np.array([numbers(row, name) for row in run.history])
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
    """Label the x axis as rounds; of stacked panels, the last one."""
    whole_numbers(axes.xaxis)
    if axes.get_subplotspec().is_last_row():
        axes.set_xlabel("round")


def round_columns(axes: Any, rounds: Sequence[int], most: int = 8) -> None:
    """Label the columns of a heat map, one per round: the multiples of the smallest step that fits."""
    numbers = np.array(rounds)
    steps = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
    ticks = next(at for step in steps if len(at := np.flatnonzero(numbers % step == 0)) <= most)
    if len(ticks) < 2:
        ticks = np.unique([0, len(numbers) - 1])
    axes.set_xticks(ticks, numbers[ticks])
    axes.set_xlabel("round")


def short_name(name: str) -> str:
    """Return a name of a client or a class for a figure, shortened if it is long."""
    return name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…"


def client_ticks(canvas: Any, axis: Any, labels: Sequence[str]) -> bool:
    """Name clients or classes along an axis, at 0, 1, …; return whether there was room for all names."""
    place = axis.axes.get_position()
    along_x = axis.axis_name == "x"
    inches = place.width * canvas.get_figwidth() if along_x else place.height * canvas.get_figheight()
    slot = 0.85 * 72 * inches / max(1, len(labels))
    if slot < 1.2 * LABEL_SIZE:
        return False
    names = list(map(short_name, labels))
    turned = along_x and max(map(len, names), default=0) * 0.65 * LABEL_SIZE + 3 > slot
    axis.set_ticks(range(len(names)), names, fontsize=LABEL_SIZE, rotation=90 if turned else 0)
    return True


def band(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return BAND's percentiles of each row, ignoring NaN; no row may be all NaN."""
    low, high = np.nanpercentile(table, BAND, axis=1)
    return low, high


def convergence(run: Run) -> Figure:
    """Plot the accuracy of all clients after the sum, of the cohort before it, and the training loss."""

    def draw(canvas: Any, paint: Paint) -> None:
        left, right = panels(canvas, (3, 2), sharex=True)
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
        "Test accuracy with the new shared state: mean over all clients, 10th to 90th percentile, and worst "
        "client; before the sum: mean over the round's cohort. Training loss: mean over the cohort."
    )
    return Figure("convergence", "Convergence", caption, draw, (WIDTH, 3.4), panels=2)


def clients(run: Run) -> Figure:
    """Plot the accuracy of the clients that have trained, last measured round, sorted and by architecture."""
    if run.clients > distributions.MANY:
        accuracy = per_cent(column(run, "accuracy")[run.history.index(run.selected)])
        pool = run.config["model.pool"]
        members: dict[str, list[int]] = {name: [] for name in pool}
        for number, name in enumerate(pool):
            members[name] += range(number, run.clients, len(pool))
        return distributions.clients(accuracy, members, f"after round {run.selected['round']}")

    def draw(canvas: Any, paint: Paint) -> None:
        left, right = panels(canvas, (3, 2), sharey=True)
        accuracy = per_cent(column(run, "accuracy")[run.history.index(run.selected)])
        order = [int(k) for k in np.argsort(accuracy) if not np.isnan(accuracy[k])]
        position = {client: number for number, client in enumerate(order)}
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
        sorted_clients(canvas, left, [run.client_labels[k] for k in order], "accuracy")
        left.set_ylabel("test accuracy, %")
        legend_above(canvas, left, 5)
        right.set_xticks(range(len(names)), names, rotation=45 if sum(map(len, names)) > 24 else 0)
        right.set_xlim(-0.6, len(names) - 0.4)
        right.set_xlabel("architecture; bar: mean")
        right.grid(axis="x", visible=False)

    when = f"after round {run.selected['round']}"
    caption = f"Test accuracy {when} of every client that has trained: sorted, and by architecture. "
    caption += "The table of clients below lists all of them."
    return Figure("clients", "Accuracy by client", caption, draw, (WIDTH, 3.2), panels=2)


def sorted_clients(canvas: Any, axes: Any, labels: Sequence[str], by: str) -> None:
    """Name sorted clients below an x axis; without room for the names, no ticks, which would be ranks."""
    if not client_ticks(canvas, axes.xaxis, labels):
        axes.set_xticks([])
    axes.set_xlabel(f"clients, sorted by {by}")


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


def partition(counts: np.ndarray, labels: Sequence[str], classes: Sequence[str] = ()) -> Figure:
    """Draw training samples, (N, classes), with classes down and clients across, N labels.

    Args:
        classes: the names of the classes, if they have names.
    """

    def draw(canvas: Any, paint: Paint) -> None:
        axes = canvas.subplots()
        table = np.where(counts.T > 0, counts.T, np.nan).astype(float)
        image = heat_map(canvas, axes, table, "training samples", (0, max(1, counts.max())))
        client_ticks(canvas, axes.xaxis, labels)
        if classes:
            client_ticks(canvas, axes.yaxis, classes)
        axes.set_xlabel("client")
        axes.set_ylabel("class")
        cell = 0.7 * 72 * canvas.get_figwidth() / len(counts)  # points
        if counts.size <= FEW_CELLS and 4 * len(str(counts.max())) < cell:
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
        left, right = panels(canvas, (1, 1), sharex=True)
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
        "Megabytes that a deployment would have sent so far, summed over the cohort; once: sent when a "
        "client first joins a cohort. Memory of the rank that uses most."
    )
    return Figure("burden", "Bytes and memory", caption, draw, (WIDTH, 2.8), panels=2)
