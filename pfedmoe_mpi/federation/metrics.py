"""The metrics of a round, their names, and the history of a run.

All rows have the same keys; a value that was not measured is null. Numbers of single clients are columns
(`storage.columns`), which only rank 0 keeps. `accuracy` is measured on all clients with the new shared state,
after aggregation; `accuracy_cohort` on the round's members with what they trained themselves, before
aggregation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from pfedmoe_mpi.federation import gates
from pfedmoe_mpi.federation.confusion import MOST_COUNTS
from pfedmoe_mpi.federation.gates import GateSum
from pfedmoe_mpi.federation.round_sum import DROPPED, IN, LATE, LOST, RoundSum
from pfedmoe_mpi.storage.columns import ClientColumns, Column, has_columns, without_columns

Row = dict[str, Any]

CLIENT_METRICS = (
    *("correct", "samples", "loss", "alpha", "auc", "validation_correct", "validation_samples"),
    *("first_correct", "first_samples", "second_correct", "second_samples"),
    *("macro_f1", "balanced_accuracy", "tuned_correct", "tuned_samples"),
)
PHASES = ("train", "evaluate", "sum", "wait")  # the parts of a rank's time in a round
RANK_METRICS = (*PHASES, "rss_mb")
# Values that came later. They follow from the models, and are left out of digests, which do not change.
LATER = ("accuracy_worst_tenth", "macro_f1", "balanced_accuracy", "test_samples", "accuracy_tuned", "gate")
UNREPEATABLE = (
    "seconds",
    "seconds_ranks",
    "rss_mb",
    "mpi_bytes",
    "masks",
)  # differ between runs with the same bits


class EvaluationSum:
    """The sum of an evaluation over all ranks, in one int64 buffer.

    Position 0 counts the ranks that were asked to stop, position 1 those whose clock asks for a checkpoint.
    Then comes a slot per measured client and per rank: one rank writes float64 bits, the others leave zeros,
    so that the sum is a gather. The sums about gates are added up as integers. The confusion matrices of the
    measured clients come last, unless there are too many numbers.

    Args:
        clients: N.
        measured: the clients that are measured, ascending; default all.
        experts: how many a gate weighs; 0 without a gate.
    """

    def __init__(
        self, clients: int, ranks: int, classes: int, measured: np.ndarray | None = None, experts: int = 0
    ) -> None:
        self.number = clients
        self.measured = np.arange(clients) if measured is None else measured
        self._split = 2 + len(self.measured) * len(CLIENT_METRICS)
        self._gates = self._split + ranks * len(RANK_METRICS)
        self._matrices = self._gates + GateSum.size(classes, experts)
        self._shape = (len(self.measured), classes, classes)
        counts = len(self.measured) * classes * classes
        self._counts = counts if counts <= MOST_COUNTS else 0
        self.buffer = np.zeros(self._matrices + self._counts, np.int64)
        self.gates = GateSum(classes, experts, self.buffer[self._gates : self._matrices])

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
        """float64 (measured, len(CLIENT_METRICS)); all zero for a client without an answer."""
        return self.buffer[2 : self._split].view(np.float64).reshape(-1, len(CLIENT_METRICS))

    @property
    def ranks(self) -> np.ndarray:
        """float64 (ranks, len(RANK_METRICS))."""
        return self.buffer[self._split : self._gates].view(np.float64).reshape(-1, len(RANK_METRICS))

    @property
    def confusion(self) -> np.ndarray | None:
        """int64 (measured, classes, classes): test rows by class and answer; None if they are not kept."""
        return self.buffer[self._matrices :].reshape(self._shape) if self._counts else None


def summary(accuracy: np.ndarray, samples: np.ndarray) -> dict[str, float | None]:
    """Return the mean over clients, sample-weighted mean, population standard deviation and worst.

    Clients whose value is not finite do not count; all four are None if none has one.
    """
    known = np.isfinite(accuracy)
    if not known.any():
        return dict.fromkeys(("mean", "weighted", "std", "worst"))
    a, n = np.stack([accuracy[known], samples[known]], axis=1).T
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
        accuracy = np.where(tested > 0, measured["correct"] / tested, np.nan)
        validation = np.where(validated > 0, measured["validation_correct"] / validated, np.nan)
        tuned = measured["tuned_correct"] / measured["tuned_samples"]  # NaN where it was not measured
    by_client = {"accuracy": accuracy}
    names = ("loss", "alpha", "auc", "macro_f1", "balanced_accuracy")
    by_client |= {name: np.where(tested > 0, measured[name], np.nan) for name in names}
    by_client["accuracy_tuned"] = tuned
    others = np.isin(evaluation.measured, list(unseen))
    training = ~others
    whose = None if len(evaluation.measured) == evaluation.number else evaluation.measured
    columns = {name: Column.of(values, whose) for name, values in by_client.items()}
    return {
        "accuracy": summary(accuracy[training], tested[training]),
        "accuracy_unseen": summary(accuracy[others], tested[others]),
        "accuracy_concepts": {name: _concept(measured, name, training) for name in ("first", "second")},
        "accuracy_validation": summary(validation[training], validated[training]),
        "accuracy_worst_tenth": worst_tenth(accuracy[training]),
        **{
            name: summary(by_client[name][training], tested[training])
            for name in ("macro_f1", "balanced_accuracy", "auc")
        },
        "test_samples": int(tested[training].sum()),
        "accuracy_tuned": summary(tuned[others], measured["tuned_samples"][others]),
        "alpha_class": _alpha_class(evaluation.gates["by_class"]),
        "gate": gates.summary(evaluation.gates),
        "clients": ClientColumns(evaluation.number, columns),
    }


def _alpha_class(by_class: np.ndarray) -> list[float | None] | None:
    """Return the mean gate weight by class, null for a class without samples; None without any gate."""
    samples, sums = by_class
    if not samples.any():
        return None
    return with_nulls(np.where(samples > 0, sums / np.maximum(samples, 1) / 2.0**gates.SCALE, np.nan))


def _concept(measured: Mapping[str, np.ndarray], name: str, clients: np.ndarray) -> float | None:
    """Return the mean accuracy over the clients, a mask, with test rows of a concept; None without any."""
    correct, samples = (measured[f"{name}_{what}"][clients] for what in ("correct", "samples"))
    tested = samples > 0
    return float((correct[tested] / samples[tested]).mean()) if tested.any() else None


def worst_tenth(accuracy: np.ndarray) -> float | None:
    """Return the mean of the lowest tenth of the clients' accuracies; None if no client has one.

    They are max(1, floor(n / 10 + ½)) of the n clients with an accuracy, as in q-FedAvg's tables (Li et al.,
    ICLR 2020, arXiv 1905.10497).
    """
    values = np.sort(accuracy[np.isfinite(accuracy)])
    return float(values[: max(1, int(len(values) / 10 + 0.5))].mean()) if len(values) else None


def row(
    round: int,
    total: RoundSum,
    evaluation: EvaluationSum,
    samples: Sequence[int] | np.ndarray,
    tested: Sequence[int] | np.ndarray,
    *,
    unseen: Collection[int] = (),
    share: float | None = None,
    bytes_once: int = 0,
    seconds: float,
    simulated: float,
) -> Row:
    """Return one round's metrics from its two sums.

    Args:
        samples: training rows of each client, (N,).
        tested: test rows of each client, (N,).
        unseen: clients that have not trained: those that never do, and those that join later.
        share: the stream's share of the second concept; None without a stream.
        bytes_once: bytes that a deployment sends a client once, before its first round.
        seconds: real time of the round.
        simulated: simulated time that the server waited for the cohort.
    """
    member = total.metrics()
    members_in = total.flags == IN
    samples, tested = np.asarray(samples), np.asarray(tested)
    cohort = np.array([client for client, _ in total.cohort], np.int64)
    before = np.where(members_in, member[:, 1], np.nan)
    # After a restart that changes `rounds` or `eval.every`, a round in progress may have unmeasured members.
    complete = np.isfinite(before[members_in & (tested[cohort] > 0)]).all()
    trained = members_in & np.isfinite(member[:, 0])
    weights = samples[cohort].astype(float)[trained]
    losses = member[trained, 0]
    largest = dict(zip(RANK_METRICS, evaluation.ranks.max(axis=0), strict=True))
    slowest = {name: float(largest[name]) for name in PHASES}
    ranks = dict(zip(RANK_METRICS, evaluation.ranks.T.round(6).tolist(), strict=True))
    up, down = member[members_in, 2:4].mean(axis=0).tolist() if members_in.any() else (None, None)
    after = evaluation_metrics(evaluation, unseen)
    columns = {name: after["clients"].column(name) for name in after["clients"]}
    columns["accuracy_before"] = Column.of(before, cohort)
    columns["samples"] = Column(None, samples.astype(np.int64, copy=False))
    columns["test_samples"] = Column(None, tested.astype(np.int64))
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
        "accuracy_cohort": summary(before if complete else np.full_like(before, np.nan), tested[cohort]),
        **{name: after[name] for name in ("accuracy_validation", *LATER, "auc")},
        "alpha_class": after["alpha_class"],
        "clients": ClientColumns(evaluation.number, columns),
        "seconds": {**slowest, "write": None, "total": seconds},
        "seconds_ranks": {name: ranks[name] for name in PHASES},
        "bytes": {"up": up, "down": down, "once": bytes_once},
        "masks": dict(total.masks.costs) if total.masks else None,
        "mpi_bytes": int(8 * (len(total.buffer) + len(evaluation.buffer))),
        "rss_mb": float(largest["rss_mb"]),
    }


def learning(row: Row) -> Row:
    """Return what repeats bit for bit, as JSON has it: no times, no memory, no bytes that MPI moved."""
    repeatable = {name: value for name, value in row.items() if name not in UNREPEATABLE}
    return {**repeatable, "clients": dict(row["clients"])} if has_columns(row) else repeatable


def fingerprint(row: Row) -> Row:
    """Return what the digest of a checkpoint covers: `learning` without the values that came later."""
    kept = {name: value for name, value in learning(row).items() if name not in LATER}
    clients = kept.get("clients")
    if isinstance(clients, Mapping):
        kept["clients"] = {name: values for name, values in clients.items() if name not in LATER}
    return kept


def for_rank(row: Mapping[str, Any], rank: int) -> Row:
    """Return what a rank keeps of a row: rank 0 all of it, in memory; the others no columns."""
    if rank:
        return dict(without_columns(row))
    return {**row, "clients": row["clients"].in_memory()} if has_columns(row) else dict(row)


def dumps(row: Mapping[str, Any]) -> str:
    """Return a row as one line of JSON, without columns; floats are read back exactly."""
    return json.dumps(without_columns(row), allow_nan=False)
