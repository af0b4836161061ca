"""The area under the ROC curve, exactly."""

from __future__ import annotations

import math

import numpy as np


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a sample of class 1 scores above one of class 0, ties counting half.

    By midranks (Mann-Whitney): whole numbers up to the one division, so that the order of samples and the
    number of batches change no bit. NaN where a class has no sample or a score is not a number.

    Args:
        scores: (n,), larger where class 1 is likelier.
        labels: (n,) of 0 and 1.
    """
    positive = labels == 1
    ones = int(positive.sum())
    zeros = len(labels) - ones
    if not ones or not zeros or np.isnan(scores).any():
        return math.nan
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    twice_midrank = 2 * np.cumsum(count) - count + 1
    return (int(twice_midrank[place][positive].sum()) - ones * (ones + 1)) / (2 * ones * zeros)
