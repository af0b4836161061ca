"""What a run cost: bytes and operations, by round, and up to a target accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pfedmoe_mpi.report.load import Run

OPERATIONS = (
    6  # per multiply-add and sample: a multiplication and an addition, forward once and backward twice
)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a deployment would send in one round, over all cohort members."""

    up: float
    down: float
    once: float

    @property
    def total(self) -> float:
        return self.up + self.down + self.once


def traffic(run: Run) -> list[Traffic]:
    """Per round: all members receive, those in the sum send, new ones get what is sent once."""
    known: set[int] = set()
    found = []
    for row in run.history:
        members = set(row["cohort"])
        left_out = {client for name in ("dropped", "lost", "late") for client in row.get(name, [])}
        sent = row["bytes"]
        up, down = ((sent.get(name) or 0.0) for name in ("up", "down"))
        once = (sent.get("once") or 0) * len(members - known)
        found.append(Traffic(up * len(members - left_out), down * len(members), once))
        known |= members
    return found


def operations(run: Run) -> list[float] | None:
    """Estimated floating-point operations of each round's training; None where the run does not tell."""
    per_sample = run.started_with("multiply_adds")
    if not per_sample or len(per_sample) != run.clients:
        return None
    epochs = run.config.get("train.epochs", 1)
    return [
        OPERATIONS * epochs * sum(per_sample[k] * row["clients"]["samples"][k] for k in row["cohort"])
        for row in run.history
    ]


@dataclass(frozen=True)
class Reached:
    """The first round at which the mean accuracy reached a target, and all it took until then."""

    round: int
    bytes: float
    operations: float | None


def reached(run: Run, target: float) -> Reached | None:
    """None if it never did."""
    for number, row in enumerate(run.history):
        mean = row["accuracy"]["mean"]
        if mean is not None and mean >= target:
            spent = operations(run)
            return Reached(
                row["round"],
                sum(sent.total for sent in traffic(run)[: number + 1]),
                None if spent is None else sum(spent[: number + 1]),
            )
    return None


def reachable(runs: Sequence[Run]) -> float | None:
    """The highest whole percent that every run reaches, as a share; None if some run was never measured."""
    tops = []
    for run in runs:
        known = [row["accuracy"]["mean"] for row in run.history if row["accuracy"]["mean"] is not None]
        if not known:
            return None
        tops.append(max(known))
    nearest = round(100 * min(tops))
    return (nearest if nearest / 100 <= min(tops) else nearest - 1) / 100
