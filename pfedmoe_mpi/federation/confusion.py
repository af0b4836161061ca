"""Counts of a classifier's answers on test rows, and the metrics that follow from them.

All counts are integers; the metrics are computed from them in one order, so that their bits do not depend on
batches or ranks.
"""

from __future__ import annotations

import math

import numpy as np

MOST_COUNTS = 1_000_000  # clients × classes², beyond which no confusion matrices are kept


def matrix(labels: np.ndarray, answers: np.ndarray, classes: int) -> np.ndarray:
    """Return how often rows of each class (first axis) were taken for each class, int64 (classes, classes).

    Args:
        labels, answers: (n,) in 0..classes-1.
    """
    flat = np.bincount(labels * classes + answers, minlength=classes * classes)
    return flat.astype(np.int64).reshape(classes, classes)


def macro_f1(labels: np.ndarray, answers: np.ndarray) -> float:
    """Return the mean F1 of the classes that occur in labels or answers, NaN without rows.

    F1 of a class is 2 · correct / (rows + answers of the class).
    """
    rows, given, correct = _by_class(labels, answers)
    occurs = rows + given > 0
    return float((2 * correct[occurs] / (rows + given)[occurs]).mean()) if occurs.any() else math.nan


def balanced_accuracy(labels: np.ndarray, answers: np.ndarray) -> float:
    """Return the mean over the classes that occur in the labels of their share of correct answers.

    NaN without rows.
    """
    rows, _, correct = _by_class(labels, answers)
    occurs = rows > 0
    return float((correct[occurs] / rows[occurs]).mean()) if occurs.any() else math.nan


def _by_class(labels: np.ndarray, answers: np.ndarray) -> list[np.ndarray]:
    """Return by class the rows, the answers and the correct answers."""
    length = int(max(labels.max(initial=-1), answers.max(initial=-1))) + 1
    return [np.bincount(c, minlength=length) for c in (labels, answers, labels[labels == answers])]
