"""Figures of one run with many clients: distributions over them, in place of every client's value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pfedmoe_mpi.report.drawing import WIDTH, Figure, Paint, legend_above, panels, style

MANY = 200  # clients; more have no room for a mark of each
BINS = 25


def clients(accuracy: np.ndarray, members: Mapping[str, Sequence[int]], when: str) -> Figure:
    """Plot the distribution of accuracy over the clients, all together and by architecture.

    Args:
        accuracy: (N,) in per cent, NaN for clients that are not shown.
        members: the clients of each architecture.
    """

    def draw(canvas: Any, paint: Paint) -> None:
        left, right = panels(canvas, (3, 2), sharey=True)
        groups = [_finite(accuracy[list(own)]) for own in members.values()]
        for number, (name, values) in enumerate(zip(members, groups, strict=True)):
            share = 100 * (np.arange(len(values)) + 0.5) / max(1, len(values))
            look = style(number, paint)
            left.plot(share, np.sort(values), color=look.color, linestyle=look.linestyle, label=name)
        left.set_xlabel("share of the architecture's clients, %")
        left.set_ylabel("test accuracy, %")
        legend_above(canvas, left, 5)
        places = np.arange(len(groups))
        boxes = right.boxplot(groups, positions=places, widths=0.6, showfliers=False, whis=(10, 90))
        for line in (line for lines in boxes.values() for line in lines):
            line.set_color(paint.ink)
        right.set_xticks(places, list(members), rotation=45 if sum(map(len, members)) > 24 else 0)
        right.set_xlabel("architecture")
        right.grid(axis="x", visible=False)

    caption = (
        f"Test accuracy {when} of the clients that were measured and have trained. Left: clients from the "
        "lowest accuracy to the highest. Right: median, quartiles, 10th and 90th percentile. The table of "
        "clients below can be searched."
    )
    return Figure("clients", "Accuracy of the clients", caption, draw, (WIDTH, 3.2), panels=2)


def partition(counts: np.ndarray) -> Figure:
    """Plot how many clients have how many training samples and classes; counts (N, classes)."""

    def draw(canvas: Any, paint: Paint) -> None:
        left, right = panels(canvas, (1, 1))
        color = style(0, paint).color
        samples = counts.sum(axis=1)
        few = samples.max() - samples.min() < BINS
        left.hist(samples, np.arange(samples.min(), samples.max() + 2) - 0.5 if few else BINS, color=color)
        left.set_xlabel("training samples")
        classes = np.bincount((counts > 0).sum(axis=1))
        right.bar(np.arange(len(classes)), classes, color=color)
        right.set_xlabel("classes")
        left.set_ylabel("clients")
        for axes in (left, right):
            axes.xaxis.get_major_locator().set_params(integer=True)

    caption = f"How many of the {len(counts):,} clients have how many training samples, of how many classes."
    return Figure("partition", "Samples and classes of the clients", caption, draw, (WIDTH, 2.8), panels=2)


def shares(table: np.ndarray) -> np.ndarray:
    """Return the share of the clients in each of BINS equal ranges of 0 to 1, (BINS, rounds), in per cent.

    Args:
        table: (rounds, N), NaN for clients without a value.
    """
    edges = np.linspace(0, 1, BINS + 1)
    found = [np.histogram(_finite(row), edges)[0] / max(1, np.isfinite(row).sum()) for row in table]
    return 100 * np.array(found).T


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]
