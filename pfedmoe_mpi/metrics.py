"""What is measured, under which name, and the history of a run.

A row's keys never vary; what was not measured is null. `accuracy` is that of all clients with the new shared
state, after aggregation; `accuracy_cohort` that of the round's members with what they trained themselves,
before aggregation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pfedmoe_mpi.roundsum import DROPPED, IN, RoundSum

Row = dict[str, Any]

CLIENT_METRICS = ("correct", "samples", "loss", "alpha", "validation_correct", "validation_samples")
RANK_METRICS = ("train", "evaluate", "sum", "wait", "rss_mb")
UNREPEATABLE = ("seconds", "rss_mb", "mpi_bytes")  # differs between runs with the same bits


class EvaluationSum:
    """Position 0 counts stops; a slot of float64 bits per client and per rank: the sum is a gather."""

    def __init__(self, clients: int, ranks: int) -> None:
        self._split = 1 + clients * len(CLIENT_METRICS)
        self.buffer = np.zeros(self._split + ranks * len(RANK_METRICS), np.int64)

    @property
    def stopped(self) -> bool:
        return bool(self.buffer[0])

    def request_stop(self) -> None:
        self.buffer[0] = 1

    @property
    def clients(self) -> np.ndarray:
        """float64 (N, len(CLIENT_METRICS)); all zero where a client was not measured."""
        return self.buffer[1 : self._split].view(np.float64).reshape(-1, len(CLIENT_METRICS))

    @property
    def ranks(self) -> np.ndarray:
        """float64 (ranks, len(RANK_METRICS))."""
        return self.buffer[self._split :].view(np.float64).reshape(-1, len(RANK_METRICS))


def summary(accuracy: Sequence[float | None], samples: Sequence[float]) -> dict[str, float | None]:
    """Mean over clients, sample-weighted mean, standard deviation (of the population) and worst."""
    known = [(a, n) for a, n in zip(accuracy, samples, strict=True) if a is not None]
    if not known:
        return dict.fromkeys(("mean", "weighted", "std", "worst"))
    a, n = np.array(known).T
    weighted = float((a * n).sum() / n.sum())
    return {"mean": float(a.mean()), "weighted": weighted, "std": float(a.std()), "worst": float(a.min())}


def nulls(values: np.ndarray) -> list[float | None]:
    """NaN and infinity as null: JSON knows neither."""
    return [float(v) if math.isfinite(v) else None for v in values]


def evaluated(evaluation: EvaluationSum) -> Row:
    """What an evaluation of all clients gives: accuracy, accuracy_validation, and arrays by client id."""
    measured = dict(zip(CLIENT_METRICS, evaluation.clients.T, strict=True))
    tested, validated = measured["samples"], measured["validation_samples"]
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy = nulls(np.where(tested > 0, measured["correct"] / tested, np.nan))
        validation = nulls(np.where(validated > 0, measured["validation_correct"] / validated, np.nan))
    return {
        "accuracy": summary(accuracy, tested.tolist()),
        "accuracy_validation": summary(validation, validated.tolist()),
        "clients": {
            "accuracy": accuracy,
            "loss": nulls(np.where(tested > 0, measured["loss"], np.nan)),
            "alpha": nulls(np.where(tested > 0, measured["alpha"], np.nan)),
        },
    }


def row(
    round: int,
    total: RoundSum,
    evaluation: EvaluationSum,
    samples: Sequence[int],
    tested: Sequence[int],
    bytes_down: int,
    seconds: float,
) -> Row:
    """One round's metrics from its two sums; `samples` and `tested`: each client's training and test rows."""
    member = total.metrics()
    members_in = total.flags == IN
    before: list[float | None] = [None] * len(samples)
    for (client, _), value in zip(
        total.cohort, nulls(np.where(members_in, member[:, 1], np.nan)), strict=True
    ):
        before[client] = value
    trained = members_in & np.isfinite(member[:, 0])
    weights = np.array([samples[client] for client, _ in total.cohort], float)[trained]
    losses = member[trained, 0]
    largest = dict(zip(RANK_METRICS, evaluation.ranks.max(axis=0), strict=True))
    spent = {name: float(largest[name]) for name in RANK_METRICS[:4]}
    up = float(member[members_in, 2].mean()) if members_in.any() else None
    after = evaluated(evaluation)
    return {
        "round": round,
        "cohort": [client for client, _ in total.cohort],
        "dropped": total.clients(DROPPED),
        "train_loss": float((losses * weights).sum() / weights.sum()) if weights.any() else None,
        "accuracy": after["accuracy"],
        "accuracy_cohort": summary(before, tested),
        "accuracy_validation": after["accuracy_validation"],
        "clients": {**after["clients"], "accuracy_before": before, "samples": list(samples)},
        "seconds": {**spent, "write": None, "total": seconds},
        "bytes": {"up": up, "down": bytes_down},
        "mpi_bytes": int(8 * (len(total.buffer) + len(evaluation.buffer))),
        "rss_mb": float(largest["rss_mb"]),
    }


def learning(row: Row) -> Row:
    """What of a row repeats bit for bit: all but time, memory and what MPI moved."""
    return {name: value for name, value in row.items() if name not in UNREPEATABLE}


def selected_on(history: Sequence[Row]) -> str:
    """Which accuracy chooses the best round: validation where there are validation rows, else test."""
    validated = any(row["accuracy_validation"]["mean"] is not None for row in history)
    return "accuracy_validation" if validated else "accuracy"


def best(history: Sequence[Row], rounds: Sequence[int] | None = None) -> Row | None:
    """The first row with the highest selecting accuracy, among `rounds` if given."""
    name = selected_on(history)
    known = [r for r in history if r[name]["mean"] is not None and (rounds is None or r["round"] in rounds)]
    return max(known, key=lambda r: (r[name]["mean"], -r["round"]), default=None)


def dumps(row: Mapping[str, Any]) -> str:
    """One line of JSON; floats repeat exactly."""
    return json.dumps(row, allow_nan=False)
