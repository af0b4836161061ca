"""What a stream's drift costs: accuracy on the concept of now and on the one before. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def new_and_old(row: Row) -> tuple[str, str]:
    """Return the concept with at least half of a round's stream (the second, if both have), and the other."""
    return ("second", "first") if row["accuracy_concepts"]["share"] >= 0.5 else ("first", "second")


def accuracies(row: Row) -> tuple[float | None, float | None]:
    """Return a round's accuracy on the new and on the old concept; None for what was not measured."""
    concepts = row["accuracy_concepts"]
    new, old = new_and_old(row)
    return concepts[new], concepts[old]


def cost(history: Sequence[Row]) -> dict[str, float | None] | None:
    """Return the cost of the last change of concept so far; None without a stream or before a change.

    `forgetting`: the best accuracy on the old concept up to the change, minus its accuracy now.
    `recovery`: rounds from the change until a measured accuracy on the new concept was as high as the last
    one on the old concept before the change; null if none was.
    """
    measured = [row for row in history if None not in row["accuracy_concepts"].values()]
    streamed = [row for row in history if measured and row["round"] <= measured[-1]["round"]]
    concept = [new_and_old(row)[0] for row in streamed]
    changes = [row["round"] for n, row in enumerate(streamed) if n and concept[n] != concept[n - 1]]
    before = [row["accuracy_concepts"] for row in measured if changes and row["round"] < changes[-1]]
    after = [row for row in measured if changes and row["round"] >= changes[-1]]
    if not before or not after:
        return None
    new, old = new_and_old(streamed[-1])
    reached = [row["round"] for row in after if row["accuracy_concepts"][new] >= before[-1][old]]
    return {
        "forgetting": max(each[old] for each in before) - after[-1]["accuracy_concepts"][old],
        "recovery": reached[0] - changes[-1] if reached else None,
    }
