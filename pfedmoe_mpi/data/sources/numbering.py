"""Labels and clients as people write them, numbers or texts, numbered from 0 in sorted order."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

_DIGITS = 20  # a label with so many digits is a name
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]*)\.[0-9]+")


def renumber(values: Iterable[Any]) -> tuple[dict[Any, int], tuple[str, ...]]:
    """Return the number of each of these different values, counted from 0 in sorted order, and their names.

    They sort as numbers if all of them are numbers, and 1 and 1.0 are then the same; else as texts.
    """
    values = list(values)
    numbers = [as_number(value) for value in values]
    keys: list[Any] = [str(value) for value in values] if None in numbers else numbers
    places = {key: place for place, key in enumerate(sorted(set(keys)))}
    return {value: places[key] for value, key in zip(values, keys, strict=True)}, tuple(map(str, places))


def sort_names(names: Iterable[str]) -> list[str]:
    """Return names sorted as numbers if all of them are numbers, else as texts."""
    names = sorted(names)
    places, _ = renumber(names)
    return sorted(names, key=places.__getitem__)


def as_number(value: Any) -> int | float | None:
    """Return a number, or a text that is one, as an integer if it is whole; None for any other text.

    Digits after a leading zero (007), twenty digits and more, and truth values are texts.
    """
    if isinstance(value, str):
        if len(value) >= _DIGITS:
            return None
        if _INTEGER.fullmatch(value):
            return int(value)
        if not _DECIMAL.fullmatch(value):
            return None
        value = float(value)
    if isinstance(value, bool) or not math.isfinite(value):
        return None
    return int(value) if value == int(value) else value
