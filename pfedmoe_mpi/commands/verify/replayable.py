"""Which rounds of a run can be replayed: from which checkpoints, and under which settings.

A checkpoint holds the settings under which the next round was trained, unless a restart changed them within
that round or after it. So each start leads as far as the next one, or as the first such restart.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pfedmoe_mpi import checkpoint, config
from pfedmoe_mpi.checkpoint import Opened
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.run.folder import RunFolder, progress

FREE = ("run.", "data.path", "model.weights", "partition.file")  # what the numbers do not depend on
Event = Mapping[str, Any]


@dataclass(frozen=True)
class Start:
    """Where a replay may start: a checkpoint of complete rounds, or the settings before round 1.

    Attributes:
        settings: by dotted name.
        code: the user's own files, by name.
        files: of the checkpoint; None before round 1.
    """

    settings: Mapping[str, Any]
    code: Mapping[str, str]
    files: Opened | None


@dataclass(frozen=True)
class Replay:
    """What is replayed: the `rounds` rounds after the first `after`."""

    after: int
    rounds: int


def open_kept(world: Comm, folder: RunFolder) -> dict[int, Start]:
    """Return the good checkpoints of complete rounds by round; collective.

    Their files are open from now on, because the run may still write checkpoints and remove others. A warning
    names each damaged one.

    Raises:
        CheckpointError: on all ranks: there is none of a round.
    """
    paths = world.from_root(
        lambda: [*checkpoint.restart_points(folder.checkpoints), folder.best], "checkpoints"
    )
    kept: dict[int, Start] = {}
    for path in (path for path in paths if "-partial" not in path.stem):
        try:
            files = checkpoint.open_files_everywhere(world, path)
            if any(start.files and start.files.seal.digest == files.seal.digest for start in kept.values()):
                continue  # best.h5 is another name of it
            with checkpoint.load_everywhere(world, files) as loaded:
                kept.setdefault(loaded.round, Start(config.flatten(loaded.config), loaded.code, files))
        except CheckpointError as error:
            if world.from_root(path.exists, "checkpoint") and world.rank == 0:
                print(f"warning: left out: {error.problem}", file=sys.stderr, flush=True)
    if not max(kept, default=0):
        problem = f"{folder.path} has no good checkpoint of a complete round"
        raise CheckpointError(problem, f"train it first: restart {folder.path}")
    return kept


def with_beginning(kept: Mapping[int, Start], lineage: Sequence[Event]) -> dict[int, Start]:
    """Return the checkpoints, and before round 1 the first settings, if the run began in this folder."""
    if 0 in kept or not lineage or lineage[0]["event"] != "start":
        return dict(kept)
    last = kept[max(kept)]
    settings = dict(last.settings)
    for line in reversed(lineage[1:]):
        settings |= {name: before for name, (before, _) in changes(line).items()}
    settings = {name: value for name, value in settings.items() if value is not None}
    return {0: Start(settings, last.code, None), **kept}


def changes(line: Event) -> dict[str, Sequence[Any]]:
    """Return the settings that a start changed and on which numbers may depend: {name: (before, after)}."""
    found = line.get("changes")
    pairs = found.items() if isinstance(found, Mapping) else ()
    return {
        name: pair
        for name, pair in pairs
        if not name.startswith(FREE) and isinstance(pair, list) and len(pair) == 2
    }


def reach(starts: Mapping[int, Start], lineage: Sequence[Event]) -> dict[int, int]:
    """Return how many rounds can be replayed from each start without passing the next one."""
    return {
        begin: _end(starts, begin, end, lineage) - begin
        for begin, end in pairwise([*sorted(starts), max(starts)])
    }


def _end(starts: Mapping[int, Start], begin: int, end: int, lineage: Sequence[Event]) -> int:
    """Return the last round up to `end` that was trained under the settings of the start after `begin`."""
    start = starts[begin]
    if start.code != starts[end].code or (not lineage and _unlike(start, starts[end])):
        return begin  # no event tells since when
    restarts = [(progress(line), changes(line)) for line in lineage if line["event"] == "restart"]
    here = {name: pair[1] for at, pairs in restarts if at == (begin, False) for name, pair in pairs.items()}
    if any(start.settings.get(name) != value for name, value in here.items() if _counts(name, start)):
        return begin  # the restart could not write its checkpoint again
    after = (at[0] for at, pairs in restarts if at > (begin, False) and any(_counts(n, start) for n in pairs))
    return min([end, *after])


def _counts(name: str, start: Start) -> bool:
    """Return whether the rounds after a start depend on a setting."""
    by_rounds = start.code or start.settings.get("train.schedule") in {"cosine", "linear"}
    return not name.startswith(FREE) and (name != "rounds" or bool(by_rounds))


def _unlike(one: Start, other: Start) -> bool:
    """Return whether two starts differ in a setting that both know."""
    names = one.settings.keys() & other.settings.keys()
    return any(one.settings[name] != other.settings[name] for name in names if _counts(name, one))


def plan(lengths: Mapping[int, int], rounds: int) -> list[Replay]:
    """Return drawn replays of `rounds` rounds in all, or of as many as can be replayed.

    Rounds that follow a start at once are drawn first: they cost one round each.

    Args:
        lengths: rounds that can be replayed from each start.
    """
    chosen = dict.fromkeys(lengths, 0)
    for distance in range(1, max(lengths.values()) + 1):
        left = rounds - sum(chosen.values())
        reachable = [start for start, length in lengths.items() if length >= distance]
        for start in random.sample(reachable, min(left, len(reachable))):
            chosen[start] = distance
    return [Replay(start, length) for start, length in chosen.items() if length]


def out_of_reach(lengths: Mapping[int, int]) -> list[range]:
    """Return the stretches of rounds that no start leads to."""
    leading = [start for start, length in sorted(lengths.items()) if length]
    reached = [0, *(start + lengths[start] for start in leading)]
    stretches = zip(reached, [*leading, max(lengths)], strict=True)
    return [range(before + 1, next_start + 1) for before, next_start in stretches if before < next_start]


def check_any(folder: RunFolder, starts: Mapping[int, Start], lengths: Mapping[int, int]) -> None:
    """Raise CheckpointError, which says why, if no round can be replayed."""
    if any(lengths.values()):
        return
    held = ", ".join(str(after) for after in sorted(starts) if starts[after].files)
    why = "settings or code changed after each of them"
    if len(starts) == 1:
        why = "by its events.jsonl it did not begin in this folder"
    raise CheckpointError(
        f"no round of {folder.path} can be replayed: it has checkpoints of round {held} alone, and {why}",
        f"train it again with --run.keep 3 or more; or `restart {folder.path} --rounds {2 * max(starts)} "
        "--run.keep 3`, whose rounds can be replayed",
    )


def origins(lineage: Sequence[Event]) -> Iterator[tuple[int, bool, str]]:
    """Yield for each start that changed what follows: after which round, whether within the next, and how."""
    for number, line in enumerate(lineage):
        if line["event"] != "restart":
            continue
        texts = [_change(name, *pair) for name, pair in changes(line).items()]
        fork = line.get("fork")
        if isinstance(fork, Mapping):
            texts.append(f"forked from {Path(str(fork.get('run'))).name}")
        elif not number:
            texts.append(f"resumed from {line.get('checkpoint')} of another run folder")
        if texts:
            yield (*progress(line), ", ".join(texts))


def _change(name: str, before: Any, after: Any) -> str:
    """Return a change of a setting as text; only one of two methods has some settings."""
    if before is None or after is None:
        return f"without {name}" if after is None else f"{name} = {after}"
    return f"{name} {before} → {after}"
