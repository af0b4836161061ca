"""The choice of anchors: M clients with roughly distinct data, anchor q tied to expert q."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_STEPS = 100  # of k-means


def by_label(counts: np.ndarray, clients: Sequence[int], number: int) -> list[int]:
    """Return clients whose label distributions overlap least, chosen greedily.

    The first client has the most concentrated labels. Each further client has the least overlap
    Σ_c min(p_c, q_c) with any client chosen before; ties are broken by the least overlap with all of them
    together, then by the most samples, then by the lowest number.

    Args:
        counts: training samples by client and class, (N, classes).
    """
    candidates = np.array(clients)
    samples = counts[candidates].sum(axis=1)
    shares = counts[candidates] / samples[:, None]
    overlap = np.minimum(shares[:, None], shares[None]).sum(axis=2)
    chosen = [int(np.lexsort((candidates, -samples, -(shares**2).sum(axis=1)))[0])]
    while len(chosen) < number:
        largest, total = overlap[chosen].max(axis=0), overlap[chosen].sum(axis=0)
        order = np.lexsort((candidates, -samples, total, largest))
        chosen.append(next(int(k) for k in order if k not in chosen))
    return candidates[chosen].tolist()


def by_cluster(means: np.ndarray, clients: Sequence[int], number: int) -> list[int]:
    """Return the clients nearest to the centres of a k-means clustering of `means` (N, d), one per cluster.

    Labels are not used. The result is deterministic: the first centre is the client farthest from the mean of
    all, each further centre the client farthest from its nearest centre; Lloyd's steps follow until no centre
    changes.
    """
    candidates = np.array(clients)
    points = means[candidates].astype(np.float64)
    initial = [int(_squared_distances(points, points.mean(axis=0)[None])[:, 0].argmax())]
    while len(initial) < number:
        initial.append(int(_squared_distances(points, points[initial]).min(axis=1).argmax()))
    centres = points[initial]
    for _ in range(MAX_STEPS):
        nearest = _squared_distances(points, centres).argmin(axis=1)
        updated = np.stack(
            [points[nearest == q].mean(axis=0) if (nearest == q).any() else centres[q] for q in range(number)]
        )
        if np.array_equal(updated, centres):
            break
        centres = updated
    distances = _squared_distances(points, centres)
    chosen: list[int] = []
    for q in range(number):
        order = np.argsort(distances[:, q], kind="stable")
        chosen.append(next(int(k) for k in order if k not in chosen))
    return candidates[chosen].tolist()


def _squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the squared Euclidean distances, (points, centres)."""
    squares: np.ndarray = ((points[:, None] - centres[None]) ** 2).sum(axis=2)
    return squares
