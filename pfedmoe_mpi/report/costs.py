"""Costs of a run: bytes and operations, by round and up to a target accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from pfedmoe_mpi.config.sections import Train
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.periods import Period, periods

# Of runs of an earlier version, per multiply-add and sample: two operations, once forward and twice backward.
OPERATIONS = 6
STEP = ("epochs", "steps", "batch", "accumulate")  # of `train`: how much a client step trains
MOST_TARGETS = 6  # accuracies of a table without --target
STEPS = (1, 2, 5, 10, 20)  # per cent from one of them to the next


@dataclass(frozen=True)
class Traffic:
    """Bytes that a deployment would send in one round, summed over the cohort."""

    up: float
    down: float
    once: float

    @property
    def total(self) -> float:
        return self.up + self.down + self.once


def traffic(run: Run) -> list[Traffic]:
    """Return the traffic of each round: every member receives, members in the sum send.

    A client receives `once` in the first round that it is a member of the cohort.
    """
    earlier: set[int] = set()
    by_round = []
    for row in run.history:
        members = set(row["cohort"])
        left_out = {client for name in ("dropped", "lost", "late") for client in row.get(name, [])}
        sent = row["bytes"]
        up, down = ((sent.get(name) or 0.0) for name in ("up", "down"))
        once = (sent.get("once") or 0) * len(members - earlier)
        by_round.append(Traffic(up * len(members - left_out), down * len(members), once))
        earlier |= members
    return by_round


def operations(run: Run) -> list[float | None]:
    """Return the floating-point operations of each round's client steps, None where not recorded.

    `federation.operations` says what is counted; runs of an earlier version recorded an estimate. Each start
    recorded those of its own rounds, so a fork has those before it only with its trunk.
    """
    found = periods(run)
    met: set[int] = set()
    by_round: list[float | None] = []
    for row in run.history:
        trained = [period for period in found if period.after < row["round"] <= period.last]
        totals = {_in_round(row, period, run.clients, met) for period in trained}
        by_round.append(totals.pop() if len(totals) == 1 else None)
        met.update(row["cohort"])
    return by_round


def _in_round(row: Mapping[str, Any], period: Period, clients: int, met: Set[int]) -> float | None:
    """Return the operations of a round by what its period recorded; `met`: clients of earlier rounds."""
    event, samples = period.event or {}, row["clients"]["samples"]
    recorded = event.get("operations") or _of_earlier_version(event)
    if not samples or not recorded or len(recorded["clients"]) != clients:
        return None
    settings = {name: period.config.get(f"train.{name}") for name in STEP}
    train = Train(**{name: value for name, value in settings.items() if value is not None})
    summed = 0.0
    for client in row["cohort"]:
        kind = recorded["kinds"][recorded["clients"][client]]
        trained, batches = _trained(train, samples[client])
        summed += kind["fixed"] + kind["epoch"] * trained + kind["batch"] * batches
        summed += samples[client] * (kind["row"] + kind["once"] * (client not in met))
    return summed


def total(counts: Sequence[float | None]) -> float | None:
    """Return the sum of what rounds took, None unless all of them are known."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _trained(train: Train, rows: int) -> tuple[int, int]:
    """Return how many rows a client step trains, each as often as it is trained, and in how many batches."""
    updates = train.updates(rows)
    epochs, more = divmod(train.steps, updates) if train.steps else (train.epochs, 0)
    batches = max(1, rows // train.batch + (rows % train.batch > 1))
    return epochs * rows + more * train.batch * train.accumulate, epochs * batches + more * train.accumulate


def _of_earlier_version(event: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the estimate from the multiply-adds of a sample's forward pass; None without."""
    each = event.get("multiply_adds")
    none = {"fixed": 0, "row": 0, "batch": 0, "once": 0}
    kinds = [{**none, "epoch": OPERATIONS * one} for one in each or ()]
    return {"kinds": kinds, "clients": list(range(len(kinds)))} if kinds else None


@dataclass(frozen=True)
class Reached:
    """The first round at which the mean accuracy reached a target, and the cost up to and including it."""

    round: int
    bytes: float
    operations: float | None


def reached(run: Run, target: float) -> Reached | None:
    """Return when and at what cost a run first reached `target`, None if it never did."""
    for number, row in enumerate(run.history):
        mean = row["accuracy"]["mean"]
        if mean is not None and mean >= target:
            return Reached(
                row["round"],
                sum(sent.total for sent in traffic(run)[: number + 1]),
                total(operations(run)[: number + 1]),
            )
    return None


def separating_targets(runs: Sequence[Run]) -> list[float]:
    """Return at most MOST_TARGETS accuracies, shares in steps of whole per cent, that separate the runs.

    None of them was reached by every run in its first measured round, and each was reached by some run.
    """
    measured = [
        [row["accuracy"]["mean"] for row in run.history if row["accuracy"]["mean"] is not None]
        for run in runs
    ]
    measured = [means for means in measured if means]
    if not measured:
        return []
    lowest, highest = min(means[0] for means in measured), max(map(max, measured))
    between = [number for number in range(1, 101) if lowest < number / 100 <= highest]
    steps = ([number for number in between if number % step == 0] for step in STEPS)
    return [number / 100 for number in next(kept for kept in steps if len(kept) <= MOST_TARGETS)]
