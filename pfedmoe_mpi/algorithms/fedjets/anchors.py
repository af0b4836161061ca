"""Which clients become anchors: M clients with roughly distinct data, anchor q tied to expert q."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STEPS = 100  # of k-means at most


def by_label(counts: np.ndarray, clients: Sequence[int], number: int) -> list[int]:
    """Clients whose label distributions overlap least, chosen greedily.

    The first has the most concentrated labels; each next one the least overlap Σ_c min(p_c, q_c) with any
    chosen before, then the least with all together, then the most samples, then the lowest number.

    Args:
        counts: training samples by client and class, (N, classes).
    """
    own = np.array(clients)
    samples = counts[own].sum(axis=1)
    shares = counts[own] / samples[:, None]
    overlap = np.minimum(shares[:, None], shares[None]).sum(axis=2)
    chosen = [int(np.lexsort((own, -samples, -(shares**2).sum(axis=1)))[0])]
    while len(chosen) < number:
        order = np.lexsort((own, -samples, overlap[chosen].sum(axis=0), overlap[chosen].max(axis=0)))
        chosen.append(next(int(k) for k in order if k not in chosen))
    return own[chosen].tolist()


def by_cluster(means: np.ndarray, clients: Sequence[int], number: int) -> list[int]:
    """The clients nearest to the centres of a k-means clustering of `means` (N, d), one per cluster.

    No label is looked at. Deterministic: the first centre is the client farthest from the mean of all, each
    next one the client farthest from its nearest centre; then Lloyd's steps until nothing changes.
    """
    own = np.array(clients)
    points = means[own].astype(np.float64)
    start = [int(_distances(points, points.mean(axis=0)[None])[:, 0].argmax())]
    while len(start) < number:
        start.append(int(_distances(points, points[start]).min(axis=1).argmax()))
    centres = points[start]
    for _ in range(STEPS):
        nearest = _distances(points, centres).argmin(axis=1)
        moved = np.stack(
            [points[nearest == q].mean(axis=0) if (nearest == q).any() else centres[q] for q in range(number)]
        )
        if np.array_equal(moved, centres):
            break
        centres = moved
    away = _distances(points, centres)
    chosen: list[int] = []
    for q in range(number):
        order = np.argsort(away[:, q], kind="stable")
        chosen.append(next(int(k) for k in order if k not in chosen))
    return own[chosen].tolist()


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances, (points, centres)."""
    squares: np.ndarray = ((points[:, None] - centres[None]) ** 2).sum(axis=2)
    return squares
