"""Which round is the best: by accuracy on validation rows where there are any, else on test rows.

All ranks have the same history, so they decide alike. Needs no torch, because reports choose alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Row = TypeVar("Row", bound=Mapping[str, Any])

VALIDATION, TEST = "accuracy_validation", "accuracy"  # what may select, by its name in a row
ROWS = {VALIDATION: "validation", TEST: "test"}  # the rows that it is measured on, in words


def mean(row: Mapping[str, Any], name: str) -> float | None:
    """Return the mean over clients of an accuracy; None if it was not measured, or by an earlier version."""
    value: float | None = (row.get(name) or {}).get("mean")
    return value


def selected_on(history: Sequence[Mapping[str, Any]]) -> str:
    """Return the accuracy that selects the best round: VALIDATION if there are validation rows, else TEST."""
    return VALIDATION if any(mean(row, VALIDATION) is not None for row in history) else TEST


def best(
    history: Sequence[Row], rounds: Sequence[int] | None = None, on: str = "", after: int = 0
) -> Row | None:
    """Return the first row with the highest accuracy, among `rounds` if given; None if none was measured.

    Args:
        on: the accuracy; default: that of `selected_on`.
        after: only later rounds, which are a fork's own (`run.forked`): those before had other settings.
    """
    name = on or selected_on(history)
    top: Row | None = None
    highest = -1.0
    for row in history:
        value = mean(row, name)
        chosen = row["round"] > after and (rounds is None or row["round"] in rounds)
        if chosen and value is not None and value > highest:
            top, highest = row, value
    return top


def improved(history: Sequence[Mapping[str, Any]], after: int = 0) -> bool:
    """Return whether the last round is better on validation rows than all before it, later than `after`."""
    return bool(history) and best(history, on=VALIDATION, after=after) is history[-1]


def exhausted(history: Sequence[Mapping[str, Any]], patience: int, after: int = 0) -> bool:
    """Return whether the last round was measured `patience` rounds or more after the best on validation rows.

    Args:
        patience: `run.patience`; 0 waits for ever.
        after: as in `best`.
    """
    top = best(history, on=VALIDATION, after=after)
    if not patience or top is None or mean(history[-1], VALIDATION) is None:
        return False
    return bool(history[-1]["round"] - top["round"] >= patience)
