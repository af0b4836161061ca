"""JSON from files that may be damaged or crafted: finite numbers, whole characters, bounded depth."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

_LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class UnusableError(ValueError):
    """An unusable object in a file; the message is worded to follow the file's name."""


def parse(text: str, what: str) -> Any:
    """Parse JSON; raise UnusableError about `what` unless numbers are finite and characters whole."""

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"the number {digits}")
        return value

    try:
        value = json.loads(text, parse_float=number, parse_constant=number)
        if _LONE_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"{what} is not JSON: {error}") from error
    return value


def read_lines(path: Path) -> list[Any]:
    """Return the value of each line of a file, None for one that is not JSON, as a killed run may leave it.

    Raises:
        UnusableError: a line that no killed run leaves: it is not UTF-8, nested too deeply, or has a number
            that is not finite.
        OSError: the file cannot be read.
    """
    values = []
    for number, raw in enumerate(path.read_bytes().splitlines(), 1):
        try:
            values.append(parse(raw.decode(), f"line {number}"))
        except UnicodeDecodeError as error:
            raise UnusableError(f"line {number} is not UTF-8") from error
        except UnusableError as error:
            if not isinstance(error.__cause__, json.JSONDecodeError):
                raise
            values.append(None)
    return values


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of an events.jsonl, [] without such a file; lines of a killed run are left out.

    Raises:
        UnusableError: a line is not an event, or as for `read_lines`.
    """
    try:
        values = read_lines(path)
    except OSError:
        return []
    for number, value in enumerate(values, 1):
        if value is not None and not _is_event(value):
            raise UnusableError(f"line {number} is not an event of a run")
    return [value for value in values if value is not None]


def _is_event(value: Any) -> bool:
    """Return whether a value has what this program reads of every event."""
    if not isinstance(value, dict) or not isinstance(value.get("event"), str):
        return False
    return all(isinstance(value.get(name, 0), int | None) for name in ("round", "steps", "pid"))
