"""The metrics of a round, their names, and the history of a run.

All rows have the same keys; a value that was not measured is null. `accuracy` is measured on all clients with
the new shared state, after aggregation; `accuracy_cohort` on the round's members with what they trained
themselves, before aggregation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from pfedmoe_mpi.core.fixedpoint import SCALE
from pfedmoe_mpi.federation import gates
from pfedmoe_mpi.federation.gates import GateSum
from pfedmoe_mpi.federation.round_sum import DROPPED, IN, LATE, LOST, RoundSum

Row = dict[str, Any]

CLIENT_METRICS = (
    *("correct", "samples", "loss", "alpha", "auc", "validation_correct", "validation_samples"),
    *("first_correct", "first_samples", "second_correct", "second_samples"),
)
PHASES = ("train", "evaluate", "sum", "wait")  # the parts of a rank's time in a round
RANK_METRICS = (*PHASES, "rss_mb")
UNREPEATABLE = ("seconds", "seconds_ranks", "rss_mb", "mpi_bytes")  # differ between runs with the same bits


class EvaluationSum:
    """The sum of an evaluation over all ranks, in one int64 buffer.

    Position 0 counts the ranks that were asked to stop, position 1 those whose clock asks for a checkpoint.
    Then comes a slot per client and per rank: one rank writes float64 bits, the others leave zeros, so that
    the sum is a gather. The sums about gates come last and are added up as integers.
    """

    def __init__(self, clients: int, ranks: int, classes: int, experts: int = 0) -> None:
        self._split = 2 + clients * len(CLIENT_METRICS)
        self._gates = self._split + ranks * len(RANK_METRICS)
        self.buffer = np.zeros(self._gates + GateSum.size(classes, experts), np.int64)
        self.gates = GateSum(classes, experts, self.buffer[self._gates :])

    @property
    def stopped(self) -> bool:
        """Whether any rank was asked to stop."""
        return bool(self.buffer[0])

    def request_stop(self) -> None:
        """Record that this rank was asked to stop."""
        self.buffer[0] = 1

    @property
    def saves(self) -> bool:
        """Whether a rank's clock asks for a checkpoint."""
        return bool(self.buffer[1])

    def request_save(self) -> None:
        """Record that this rank's clock asks for a checkpoint."""
        self.buffer[1] = 1

    @property
    def clients(self) -> np.ndarray:
        """float64 (N, len(CLIENT_METRICS)); all zero where a client was not measured."""
        return self.buffer[2 : self._split].view(np.float64).reshape(-1, len(CLIENT_METRICS))

    @property
    def ranks(self) -> np.ndarray:
        """float64 (ranks, len(RANK_METRICS))."""
        return self.buffer[self._split : self._gates].view(np.float64).reshape(-1, len(RANK_METRICS))


def summary(accuracy: Sequence[float | None], samples: Sequence[float]) -> dict[str, float | None]:
    """Return the mean over clients, sample-weighted mean, population standard deviation and worst.

    Clients without a value do not count; all four are None if none has one.
    """
    measured = [(a, n) for a, n in zip(accuracy, samples, strict=True) if a is not None]
    if not measured:
        return dict.fromkeys(("mean", "weighted", "std", "worst"))
    a, n = np.array(measured).T
    weighted = float((a * n).sum() / n.sum())
    return {"mean": float(a.mean()), "weighted": weighted, "std": float(a.std()), "worst": float(a.min())}


def with_nulls(values: np.ndarray) -> list[float | None]:
    """Return the values with None for NaN and infinity, which JSON does not have."""
    return [float(v) if math.isfinite(v) else None for v in values]


def evaluation_metrics(evaluation: EvaluationSum, unseen: Collection[int] = ()) -> Row:
    """Return an evaluation's metrics: summaries of training and of unseen clients, and values by client."""
    measured = dict(zip(CLIENT_METRICS, evaluation.clients.T, strict=True))
    tested, validated = measured["samples"], measured["validation_samples"]
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy = with_nulls(np.where(tested > 0, measured["correct"] / tested, np.nan))
        validation = with_nulls(np.where(validated > 0, measured["validation_correct"] / validated, np.nan))
    auc = with_nulls(np.where(tested > 0, measured["auc"], np.nan))
    others = [k for k in range(len(accuracy)) if k in unseen]
    training = [k for k in range(len(accuracy)) if k not in unseen]
    return {
        "accuracy": summary([accuracy[k] for k in training], tested[training].tolist()),
        "accuracy_unseen": summary([accuracy[k] for k in others], tested[others].tolist()),
        "accuracy_concepts": {name: _concept(measured, name, training) for name in ("first", "second")},
        "accuracy_validation": summary([validation[k] for k in training], validated[training].tolist()),
        "auc": summary([auc[k] for k in training], tested[training].tolist()),
        "alpha_class": _alpha_class(evaluation.gates["by_class"]),
        "gate": gates.summary(evaluation.gates),
        "clients": {
            "accuracy": accuracy,
            "loss": with_nulls(np.where(tested > 0, measured["loss"], np.nan)),
            "alpha": with_nulls(np.where(tested > 0, measured["alpha"], np.nan)),
            "auc": auc,
        },
    }


def _alpha_class(by_class: np.ndarray) -> list[float | None] | None:
    """Return the mean gate weight by class, null for a class without samples; None without any gate."""
    samples, sums = by_class
    if not samples.any():
        return None
    return with_nulls(np.where(samples > 0, sums / np.maximum(samples, 1) / 2.0**SCALE, np.nan))


def _concept(measured: Mapping[str, np.ndarray], name: str, clients: Sequence[int]) -> float | None:
    """Return the mean accuracy over the clients with test rows of a concept; None without any."""
    correct, samples = (measured[f"{name}_{what}"][clients] for what in ("correct", "samples"))
    tested = samples > 0
    return float((correct[tested] / samples[tested]).mean()) if tested.any() else None


def drift(history: Sequence[Row]) -> dict[str, float | None] | None:
    """Return the cost of the last change of concept so far; None without a stream or before a change.

    `forgetting`: the best accuracy on the old concept up to the change, minus its accuracy now.
    `recovery`: rounds from the change until the accuracy on the new concept reached that of the old one right
    before the change; null if it has not.
    """
    rows = [row for row in history if None not in row["accuracy_concepts"].values()]
    is_second = [row["accuracy_concepts"]["share"] >= 0.5 for row in rows]
    changes = [n for n in range(1, len(rows)) if is_second[n] != is_second[n - 1]]
    if not changes:
        return None
    at = changes[-1]
    new_name, old_name = ("second", "first") if is_second[at] else ("first", "second")
    old, new = ([row["accuracy_concepts"][name] for row in rows] for name in (old_name, new_name))
    reached = [n for n in range(at, len(rows)) if new[n] >= old[at - 1]]
    recovery = rows[reached[0]]["round"] - rows[at]["round"] if reached else None
    return {"forgetting": max(old[:at]) - old[-1], "recovery": recovery}


def row(
    round: int,
    total: RoundSum,
    evaluation: EvaluationSum,
    samples: Sequence[int],
    tested: Sequence[int],
    *,
    unseen: Collection[int] = (),
    share: float | None = None,
    bytes_once: int = 0,
    seconds: float,
    simulated: float,
) -> Row:
    """Return one round's metrics from its two sums.

    Args:
        samples: training rows of each client.
        tested: test rows of each client.
        unseen: clients that have not trained: those that never do, and those that join later.
        share: the stream's share of the second concept; None without a stream.
        bytes_once: bytes that a deployment sends a client once, before its first round.
        seconds: real time of the round.
        simulated: simulated time that the server waited for the cohort.
    """
    member = total.metrics()
    members_in = total.flags == IN
    before: list[float | None] = [None] * len(samples)
    for (client, _), value in zip(
        total.cohort, with_nulls(np.where(members_in, member[:, 1], np.nan)), strict=True
    ):
        before[client] = value
    # After a restart that changes `rounds` or `eval.every`, a round in progress may have unmeasured members.
    measured = [before[client] is not None for client in total.clients(IN) if tested[client]]
    trained = members_in & np.isfinite(member[:, 0])
    weights = np.array([samples[client] for client, _ in total.cohort], float)[trained]
    losses = member[trained, 0]
    largest = dict(zip(RANK_METRICS, evaluation.ranks.max(axis=0), strict=True))
    slowest = {name: float(largest[name]) for name in PHASES}
    ranks = dict(zip(RANK_METRICS, evaluation.ranks.T.round(6).tolist(), strict=True))
    up, down = member[members_in, 2:4].mean(axis=0).tolist() if members_in.any() else (None, None)
    after = evaluation_metrics(evaluation, unseen)
    return {
        "round": round,
        "cohort": [client for client, _ in total.cohort],
        "dropped": total.clients(DROPPED),
        "lost": total.clients(LOST),
        "late": total.clients(LATE),
        "simulated_time": simulated,
        "train_loss": float((losses * weights).sum() / weights.sum()) if weights.any() else None,
        "accuracy": after["accuracy"],
        "accuracy_unseen": after["accuracy_unseen"],
        "accuracy_concepts": {**after["accuracy_concepts"], "share": share},
        "accuracy_cohort": summary(before if all(measured) else [None] * len(before), tested),
        "accuracy_validation": after["accuracy_validation"],
        "auc": after["auc"],
        "alpha_class": after["alpha_class"],
        "gate": after["gate"],
        "clients": {**after["clients"], "accuracy_before": before, "samples": list(samples)},
        "seconds": {**slowest, "write": None, "total": seconds},
        "seconds_ranks": {name: ranks[name] for name in PHASES},
        "bytes": {"up": up, "down": down, "once": bytes_once},
        "mpi_bytes": int(8 * (len(total.buffer) + len(evaluation.buffer))),
        "rss_mb": float(largest["rss_mb"]),
    }


def learning(row: Row) -> Row:
    """Return what repeats bit for bit: a row without times, memory and the bytes that MPI moved."""
    return {name: value for name, value in row.items() if name not in UNREPEATABLE}


def selected_on(history: Sequence[Row]) -> str:
    """Return the accuracy that selects the best round: validation if there are validation rows, else test."""
    validated = any(row["accuracy_validation"]["mean"] is not None for row in history)
    return "accuracy_validation" if validated else "accuracy"


def best(history: Sequence[Row], rounds: Sequence[int] | None = None) -> Row | None:
    """Return the first row with the highest selecting accuracy, among `rounds` if given; None without any."""
    name = selected_on(history)
    measured = [
        r for r in history if r[name]["mean"] is not None and (rounds is None or r["round"] in rounds)
    ]
    return max(measured, key=lambda r: (r[name]["mean"], -r["round"]), default=None)


def dumps(row: Mapping[str, Any]) -> str:
    """Return a row as one line of JSON; floats are read back exactly."""
    return json.dumps(row, allow_nan=False)
