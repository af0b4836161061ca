"""What clients' gates do: how much their weights differ, and the accuracy without them.

A client's numbers are computed on one rank and rounded to multiples of 2^-SCALE, so that their integer sum
does not depend on the ranks. Accuracies under other weights come from the experts' outputs that the accuracy
itself was measured with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from pfedmoe_mpi.algorithms.base import Algorithm, Mixture

SCALE = 30  # bits after the binary point, so that sums over 2^33 samples fit
ROWS = 64  # test rows that all gates weigh

# Measured on a client's test samples, each for one expert except those of `SINGLE`.
BY_EXPERT = (
    "load",  # Σ w
    "first",  # samples whose largest weight is this expert's; equal weights share a sample
    "within",  # Σ (w - mean of the sample's class)²
    "classes",  # Σ (mean of the sample's class - mean of the client)²
    "clients",  # Σ (mean of the client)²
    "without",  # accuracy if the others have its weight
    "replaceable",  # clients with others, of which it is measured
)
SINGLE = ("samples", "measured", "entropy", "constant")  # `constant`: accuracy with each weight at its mean


def shapes(classes: int, experts: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the sums; without `experts` only that by class, which all methods have."""
    found: dict[str, tuple[int, ...]] = {"by_class": (2, classes)}
    if experts:
        found |= dict.fromkeys(SINGLE, ()) | dict.fromkeys(BY_EXPERT, (experts,))
        found |= dict.fromkeys(("rows", "rows_squared"), (ROWS, experts))
    return found


class GateSum:
    """Sums over clients about their gates, int64; see `shapes`.

    `by_class` holds the samples of each class and their Σ α, α being the weight of all shared experts;
    `rows` and `rows_squared` hold Σ w and Σ w² over clients of every row that all gates weigh.
    """

    def __init__(self, classes: int, experts: int, buffer: np.ndarray | None = None) -> None:
        """Divide `buffer`, (size,), without copying; default: zeros."""
        self.experts = experts
        sizes = {name: (shape, math.prod(shape)) for name, shape in shapes(classes, experts).items()}
        self.buffer = np.zeros(self.size(classes, experts), np.int64) if buffer is None else buffer
        self._parts: dict[str, np.ndarray] = {}
        start = 0
        for name, (shape, size) in sizes.items():
            self._parts[name] = self.buffer[start : start + size].reshape(shape)
            start += size

    @staticmethod
    def size(classes: int, experts: int) -> int:
        """Return the number of int64 values."""
        return sum(map(math.prod, shapes(classes, experts).values()))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._parts[name]

    def add(self, name: str, value: np.ndarray | float) -> None:
        """Add real numbers, rounded to multiples of 2^-SCALE."""
        self._parts[name] += np.rint(np.asarray(value, float) * 2.0**SCALE).astype(np.int64)

    def real(self, name: str) -> np.ndarray:
        """Return the real numbers that were added up."""
        return self._parts[name] * 2.0**-SCALE


def of_client(
    method: Algorithm, measured: Sequence[tuple[Mixture, torch.Tensor]], rows: Sequence[torch.Tensor]
) -> GateSum:
    """Return a client's share of the sums; zeros without samples.

    Weights that are not finite leave out their sample in `by_class`, and the client in everything else.

    Args:
        measured: the mixtures of the client's test samples, in batches, with the samples' classes.
        rows: its gate's weights of the common rows, in batches.
    """
    total = GateSum(method.task.classes, method.experts)
    if measured:
        w, common = (_array(parts) for parts in ([mixture.weights for mixture, _ in measured], rows))
        y = _array([labels for _, labels in measured])
        private = measured[0][0].private
        if private:
            _add_classes(total, w[:, :-private].sum(1), y)
        if np.isfinite(w).all() and np.isfinite(common).all():
            _add_gate(total, w, y, common)
            _add_accuracies(total, measured, w.mean(0))
    return total


def _array(parts: Sequence[torch.Tensor]) -> np.ndarray:
    """Return tensors one after the other, float64 if they are not integers."""
    joined = torch.cat(list(parts)).cpu()
    array: np.ndarray = (joined.double() if joined.is_floating_point() else joined).numpy()
    return array


def _add_classes(total: GateSum, alpha: np.ndarray, y: np.ndarray) -> None:
    """Add samples and Σ α, (n,), by class."""
    finite = np.isfinite(alpha)
    np.add.at(total["by_class"][0], y[finite], 1)
    np.add.at(total["by_class"][1], y[finite], np.rint(alpha[finite] * 2.0**SCALE).astype(np.int64))


def _add_gate(total: GateSum, w: np.ndarray, y: np.ndarray, rows: np.ndarray) -> None:
    """Add what a client's weights (n, experts) of its samples of classes (n,) are, and those of the rows."""
    mean = w.mean(0)
    of_class = {label: w[y == label].mean(0) for label in np.unique(y).tolist()}
    of_sample = np.stack([of_class[label] for label in y.tolist()])
    total["samples"][...] += len(w)
    total["measured"][...] += 1
    largest = w == w.max(1, keepdims=True)
    total.add("first", (largest / largest.sum(1, keepdims=True)).sum(0))
    total.add("load", w.sum(0))
    total.add("within", ((w - of_sample) ** 2).sum(0))
    total.add("classes", ((of_sample - mean) ** 2).sum(0))
    total.add("clients", len(w) * mean**2)
    share = w / np.maximum(w.sum(1, keepdims=True), np.finfo(float).tiny)
    total.add("entropy", -(share * np.log(np.maximum(share, np.finfo(float).tiny))).sum())
    padding = ((0, ROWS - len(rows)), (0, 0))
    total.add("rows", np.pad(rows, padding))
    total.add("rows_squared", np.pad(rows**2, padding))


def _add_accuracies(
    total: GateSum, measured: Sequence[tuple[Mixture, torch.Tensor]], mean: np.ndarray
) -> None:
    """Add a client's accuracies under other weights than its gate's, whose mean is (experts,)."""

    def accuracy(change: Callable[[np.ndarray], np.ndarray]) -> float:
        right = [
            mixture.answer(torch.from_numpy(change(_array([mixture.weights]))).to(mixture.weights)).argmax(1)
            == y
            for mixture, y in measured
        ]
        return float(torch.cat(right).double().mean())

    total.add("constant", accuracy(lambda weights: np.tile(mean, (len(weights), 1))))
    for expert in range(len(mean)):
        others = np.isin(np.arange(len(mean)), measured[0][0].evaluated) & (np.arange(len(mean)) != expert)
        if others.any():
            without = accuracy(partial(without_expert, mean=mean, keep=others))
            total["without"][expert] += round(without * 2**SCALE)
            total["replaceable"][expert] += 1


def without_expert(weights: np.ndarray, mean: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Return weights (n, experts) in which those to keep have all the weight, in their proportions.

    Where these have no weight, as with top-1 routing, their proportions are those of the `mean`, and equal if
    the gate never uses them.

    Args:
        mean: the client's mean weights, (experts,).
        keep: a mask, (experts,).
    """
    others = weights * keep
    empty = others.sum(1) == 0
    others[empty] = mean * keep if (mean * keep).any() else keep
    rest = np.maximum(others.sum(1, keepdims=True), np.finfo(float).tiny)
    return others / rest * weights.sum(1, keepdims=True)


def summary(total: GateSum) -> dict[str, Any]:
    """Return the metrics of all gates together; each is None without a gate. See `run/README.md`."""
    nothing: dict[str, Any] = {
        **dict.fromkeys(("load", "first", "entropy", "disagreement")),
        "spread": dict.fromkeys(("within", "classes", "clients")),
        "accuracy": dict.fromkeys(("constant", "without")),
    }
    if not total.experts or not total["samples"]:
        return nothing
    n, k = int(total["samples"]), int(total["measured"])
    mean = total.real("load") / n
    between = np.maximum(total.real("clients") / n - mean**2, 0)
    spread = {"within": total.real("within") / n, "classes": total.real("classes") / n, "clients": between}
    rows = total.real("rows") / k
    disagreement = np.sqrt(np.maximum(total.real("rows_squared") / k - rows**2, 0))
    used = rows.sum(1) > 0  # fewer than ROWS in small data
    return {
        "load": mean.tolist(),
        "first": (total.real("first") / n).tolist(),
        "entropy": float(total.real("entropy")) / n / math.log(max(2, total.experts)),
        "disagreement": disagreement[used].mean(0).tolist() if used.any() else None,
        "spread": {name: np.sqrt(values).tolist() for name, values in spread.items()},
        "accuracy": {
            "constant": float(total.real("constant")) / k,
            "without": [
                float(value) / int(number) if number else None
                for value, number in zip(total.real("without"), total["replaceable"], strict=True)
            ],
        },
    }
