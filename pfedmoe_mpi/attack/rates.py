"""How well scores tell members from others: AUC, true-positive rates at few false positives, intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pfedmoe_mpi.federation.evaluation import auc

FALSE_POSITIVES = (0.001, 0.01)  # rates at which the true-positive rate is reported
NORMAL = 1.959964  # 97.5 % quantile of the normal distribution


def rates(members: np.ndarray, others: np.ndarray, threshold: float) -> dict[str, Any]:
    """Return what scores (n,), larger for likelier members, say about an attack.

    auc with its 95 % interval by DeLong, DeLong and Clarke-Pearson 1988; `tpr` by false-positive rate with
    its 95 % interval by Clopper and Pearson 1934 for this threshold, null where there are too few others to
    state the rate; and the balanced accuracy of the threshold, which was chosen without looking at others.
    """
    labels = np.repeat([1, 0], [len(members), len(others)])
    area = auc(np.concatenate([members, others]), labels)
    right = [(members >= threshold).mean(), (others < threshold).mean()]
    return {
        "members": len(members),
        "others": len(others),
        "auc": area,
        "auc_interval": _delong(members, others, area),
        "balanced_accuracy": float(np.mean(right)),
        "tpr": {f"{rate:g}": _at(rate, members, others) for rate in FALSE_POSITIVES},
    }


def _at(rate: float, members: np.ndarray, others: np.ndarray) -> dict[str, Any] | None:
    """Return the true-positive rate where at most this share of the others scores higher.

    None if that is not even one of the others.
    """
    allowed = math.floor(rate * len(others) + 1e-9)
    if not allowed:
        return None
    bar = np.sort(others)[::-1][allowed] if allowed < len(others) else -np.inf
    found = int((members > bar).sum())
    return {"rate": found / len(members), "interval": clopper_pearson(found, len(members))}


def _delong(members: np.ndarray, others: np.ndarray, area: float) -> list[float] | None:
    """Return the 95 % interval of an AUC; None with fewer than two scores of a kind."""
    if min(len(members), len(others)) < 2:
        return None
    placed = [_share_below(np.sort(others), members), 1 - _share_below(np.sort(members), others)]
    spread = NORMAL * math.sqrt(sum(float(each.var(ddof=1)) / len(each) for each in placed))
    return [max(0.0, area - spread), min(1.0, area + spread)]


def _share_below(ordered: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return for each score the share of the ordered ones below it, ties counting half."""
    sides = [np.searchsorted(ordered, scores, side) for side in ("left", "right")]
    return np.asarray((sides[0] + sides[1]) / 2 / len(ordered))


def clopper_pearson(found: int, total: int) -> list[float]:
    """Return the exact 95 % interval of a share `found` / `total`, by bisection of the binomial tails."""
    low = 0.0 if not found else _solve(lambda p: _tail(found, total, p) - 0.025)
    high = 1.0 if found == total else _solve(lambda p: _tail(found + 1, total, p) - 0.975)
    return [low, high]


def _solve(rising: Any) -> float:
    """Return where a rising function of p in (0, 1) is zero."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def _tail(least: int, total: int, p: float) -> float:
    """Return the chance of at least `least` successes in `total` trials of chance p."""
    k = np.arange(least, total + 1)
    logs = np.cumsum(np.log(np.arange(1, total + 1)))
    factorial = np.concatenate([[0.0], logs])
    chances = (
        factorial[total]
        - factorial[k]
        - factorial[total - k]
        + k * math.log(p)
        + (total - k) * math.log1p(-p)
    )
    return float(np.exp(chances).sum())
