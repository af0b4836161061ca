"""The likelihood-ratio attack (LiRA): is a row's score that of models that were trained on it, or of others?

Carlini, Chien, Nasr, Song, Terzis and Tramèr, "Membership Inference Attacks From First Principles", IEEE S&P
2022, arXiv 2112.03570, the online attack (Algorithm 1): a row's scores φ = log(p / (1 − p)) of its true class
are Gaussian over shadow models, with a mean for those that were trained on it and another for the rest.
Departures:

- A row has its own means, but all rows share one variance, in and out: the paper takes one for in and one for
  out below some 64 shadow models, but with a few runs a row is a test row once, and that has no variance.
- A model is asked once for a row; the paper also asks for augmented ones.
- The paper trains on each row with probability 1/2. Here the split decides, so that most rows are training
  rows of most runs. A row that is a training row of all runs, or of none, is left out.
- The shared part is attacked without its clients' heads, with those of `shared_part.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pfedmoe_mpi.attack.rates import rates

LEAST = 1e-6  # added to a variance
SURE = 1e-12  # the least loss, so that a score is finite


@dataclass(frozen=True)
class Losses:
    """The losses of one model: rows (n,) ascending, loss (n,), trained (n,) bool."""

    rows: np.ndarray
    loss: np.ndarray
    trained: np.ndarray

    @classmethod
    def of(cls, members: tuple[np.ndarray, np.ndarray], others: tuple[np.ndarray, np.ndarray]) -> Losses:
        """Return the losses of members and of others, each given as rows and losses."""
        rows, loss = (np.concatenate(pair) for pair in zip(members, others, strict=True))
        order = np.argsort(rows, kind="stable")
        trained = np.repeat([True, False], [len(members[0]), len(others[0])])
        return cls(rows[order], loss[order], trained[order])

    def rates(self, centre: float) -> dict[str, Any]:
        """Return what a threshold on the loss reaches."""
        return rates(centre - self.loss[self.trained], centre - self.loss[~self.trained], 0.0)

    @property
    def threshold(self) -> float:
        """The mean loss of the training rows."""
        return float(self.loss[self.trained].mean())

    def scores(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return φ of these rows, NaN where it is not known, and whether each was trained, both (n,)."""
        phi, trained = np.full(len(rows), np.nan), np.zeros(len(rows), bool)
        _, mine, theirs = np.intersect1d(self.rows, rows, assume_unique=True, return_indices=True)
        loss = self.loss[mine]
        phi[theirs] = -loss - np.log(-np.expm1(-np.maximum(loss, SURE)))
        trained[theirs] = self.trained[mine]
        return phi, trained


def ratios(own: Losses, shadows: Sequence[Losses]) -> tuple[np.ndarray, np.ndarray]:
    """Return the log likelihood ratios of the attacked model's members and of its others.

    Rows that are not training rows of one shadow model and known to another that was not trained on them are
    left out.
    """
    value, is_member = own.scores(own.rows)
    found = [shadow.scores(own.rows) for shadow in shadows]
    phi = np.stack([each for each, _ in found])
    trained = np.stack([each for _, each in found])
    masks = [trained & ~np.isnan(phi), ~trained & ~np.isnan(phi)]
    known = masks[0].any(0) & masks[1].any(0)
    squares, freedom, means = 0.0, 0, []
    for mask in (mask[:, known] for mask in masks):
        values = np.where(mask, phi[:, known], 0.0)
        means.append(values.sum(0) / mask.sum(0))
        squares += float((np.where(mask, values - means[-1], 0.0) ** 2).sum())
        freedom += int(mask.sum()) - mask.shape[1]
    variance = squares / max(1, freedom) + LEAST
    distances = [(value[known] - mean) ** 2 for mean in means]
    ratio = (distances[1] - distances[0]) / (2 * variance)
    return ratio[is_member[known]], ratio[~is_member[known]]


def attack(pairs: Sequence[tuple[Losses, Sequence[Losses]]], shadows: int) -> dict[str, Any]:
    """Return what the ratios of several models reach together, or the reason why they cannot.

    Args:
        pairs: each attacked model's losses, and those of its shadow models.
        shadows: the number of shadow runs.
    """
    found = [ratios(*pair) for pair in pairs]
    members, others = (np.concatenate([[], *(pair[place] for pair in found)]) for place in (0, 1))
    if not len(members) or not len(others):
        return {
            "shadows": shadows,
            "reason": "no row is a training row of one shadow run and a test row of another",
        }
    return {"shadows": shadows, **rates(members, others, 0.0)}
