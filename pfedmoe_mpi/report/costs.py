"""Costs of a run: bytes and operations, by round and up to a target accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pfedmoe_mpi.config.sections import Train
from pfedmoe_mpi.report.load import Run

# Per multiply-add and sample: a multiplication and an addition, once forward and twice backward.
OPERATIONS = 6
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


def operations(run: Run) -> list[float] | None:
    """Estimate the floating-point operations of each round's training; None if not recorded."""
    per_sample = run.started_with("multiply_adds")
    if not per_sample or len(per_sample) != run.clients:
        return None
    names = ("epochs", "steps", "batch", "accumulate")
    train = Train(**{name: run.config[f"train.{name}"] for name in names if f"train.{name}" in run.config})

    def of_client(client: int, rows: int) -> float:
        return float(per_sample[client] * rows * train.passes(rows))

    return [
        OPERATIONS * sum(of_client(k, samples[k]) for k in row["cohort"])
        for row in run.history
        if (samples := row["clients"]["samples"])
    ]


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
            count = operations(run)
            return Reached(
                row["round"],
                sum(sent.total for sent in traffic(run)[: number + 1]),
                None if count is None else sum(count[: number + 1]),
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
