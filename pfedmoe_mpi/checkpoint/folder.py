"""The checkpoints in a folder, by their names."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from pfedmoe_mpi.checkpoint.places import NAME, files_needed


def name(round: int, partial: bool) -> str:
    """Return `round-000020.h5`, or `round-000021-partial.h5` for a round in progress."""
    return f"round-{round + 1:06d}-partial.h5" if partial else f"round-{round:06d}.h5"


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, newest first; a partial round 21 lies between 20 and 21."""
    matches = ((NAME.fullmatch(path.name), path) for path in folder.glob("round-*.h5"))
    by_age = [((int(match[1]), not match[2]), path) for match, path in matches if match]
    return [path for _, path in sorted(by_age, reverse=True)]


def newest(folder: Path, tried: Collection[Path]) -> Path | None:
    """Return the newest checkpoint that was not tried; a run may have written and removed some meanwhile."""
    return next((path for path in newest_first(folder) if path not in tried), None)


def restart_points(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder without those that are there only because others rely on them."""
    names = {path.name: path for path in newest_first(folder)}
    points = []
    for path in names.values():
        with suppress(OSError):
            points += [path] if files_needed(path) <= names.keys() else []
    return points
