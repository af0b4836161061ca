"""A comparison of how the ranks were started: the same arguments, settings and source files on every rank.

Ranks that differ would train without any error to a result that no configuration describes: a command line
with `:` between unlike parts, a configuration file or a copy of the program that one host did not update.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from pfedmoe_mpi.errors import LaunchError

PACKAGE = Path(__file__).parents[1]
MOST_SHOWN = 5  # differences in a message
ABSENT = "nothing"
SUFFIXES = (".py", ".h5")  # code and the digits that come with it

Facts = Mapping[str, str]  # an argument, a setting or a source file: its value, or its SHA-256


def facts(given: Mapping[str, Any], package: Path = PACKAGE) -> Facts:
    """Return what must be equal on all ranks: what the command was given, and its source files' digests.

    Raises:
        LaunchError: a source file cannot be read.
    """
    values = {name: _text(value) for name, value in given.items()}
    try:
        paths = [path for path in sorted(package.rglob("*")) if path.suffix in SUFFIXES]
        sources = {path: sha256(path.read_bytes()).hexdigest() for path in paths}
    except OSError as error:
        raise LaunchError(f"a source file cannot be read: {error}", "install the program again") from error
    return values | {str(path.relative_to(package.parent)): digest for path, digest in sources.items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def digest(of: Facts) -> str:
    """Return the SHA-256 of facts."""
    return sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()


def difference(ranks: Sequence[Facts]) -> LaunchError:
    """Return the error that names the ranks that differ from rank 0, and in what."""
    unlike: dict[str, list[int]] = {}
    for rank, of in enumerate(ranks):
        if of != ranks[0]:
            unlike.setdefault(_compare(ranks[0], of), []).append(rank)
    lines = [
        f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}: {text}"
        for text, numbers in unlike.items()
    ]
    files = any(name.endswith(SUFFIXES) for of in ranks for name in _names(ranks[0], of))
    remedy = "start every rank with the same arguments and configuration file, in the same folder"
    if files:
        remedy = "use one installation for all ranks, or update the program on every host"
    return LaunchError("\n".join(["the ranks were not started alike", *lines]), remedy)


def _names(first: Facts, other: Facts) -> list[str]:
    """Return the names of what differs."""
    return [name for name in {**first, **other} if first.get(name) != other.get(name)]


def _compare(first: Facts, other: Facts) -> str:
    """Return a line on what another rank has instead of rank 0's."""
    names = _names(first, other)
    parts = [_describe(name, first, other) for name in names[:MOST_SHOWN]]
    more = f"; and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return "; ".join(parts) + more


def _describe(name: str, first: Facts, other: Facts) -> str:
    if not name.endswith(SUFFIXES):
        return f"{name} = {other.get(name, ABSENT)}, on rank 0 {first.get(name, ABSENT)}"
    if name not in other:
        return f"{name} is missing"
    return f"{name} differs from rank 0's" if name in first else f"{name} does not exist on rank 0"
