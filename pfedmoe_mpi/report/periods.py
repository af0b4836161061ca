"""Periods of a run: which start trained which rounds, under which settings, also before it branched off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pfedmoe_mpi.config.config import REFERENCES
from pfedmoe_mpi.report.load import STARTS, Run
from pfedmoe_mpi.user_code import label

Change = tuple[Any, Any]  # a setting's value before and after


@dataclass(frozen=True)
class Period:
    """Rounds `after` + 1 to `last`, trained by one start under `config`.

    Attributes:
        event: what the start recorded; None where that is in the folder of another run.
        changes: the settings that changed with it.
    """

    after: int
    last: float
    config: Mapping[str, Any]
    event: Mapping[str, Any] | None
    changes: dict[str, Change] = field(default_factory=dict)


def periods(run: Run) -> list[Period]:
    """Return the periods of a run, from round 1 on; those before a fork as `run.trunk` recorded them.

    Two periods have a round in common if a start went on within that round. Rounds that a later start
    trained again, from an older checkpoint, are in that start's period alone.
    """
    config = dict(run.config)
    found: list[Period] = []
    begun, last = math.inf, math.inf
    for event in reversed([event for event in run.events if event["event"] in STARTS]):
        after = event.get("round") or 0
        if after > begun:
            continue
        if after < begun:
            found.append(Period(after, last, dict(config), event))
        changes = found[-1].changes
        for name, (old, new) in _changes(event).items():
            changes[name] = (old, changes[name][1] if name in changes else new)
            config[name] = old
        begun, last = after, after + ("partial" in str(event.get("checkpoint")))
    if begun > 0:
        earlier = periods(run.trunk) if run.trunk else [Period(0, last, config, None)]
        found += [replace(one, last=min(one.last, last)) for one in reversed(earlier) if one.after < begun]
    return found[::-1]


def _changes(event: Mapping[str, Any]) -> dict[str, Change]:
    """Return the settings that a start changed, with short names for code of the user's own."""
    changes = event.get("changes")
    pairs = changes.items() if isinstance(changes, dict) else ()
    found = {name: pair for name, pair in pairs if isinstance(pair, list) and len(pair) == 2}
    return {name: (_short(name, pair[0]), _short(name, pair[1])) for name, pair in found.items()}


def _short(name: str, value: Any) -> Any:
    return label(value) if name in REFERENCES and isinstance(value, str) else value


def forked_after(run: Run) -> int | None:
    """Return the round after which a run branched off another one, None if it did not."""
    fork = run.started_with("fork")
    return fork["round"] if isinstance(fork, dict) and isinstance(fork.get("round"), int) else None


def agree(run: Run, branch: Run, at: int) -> bool:
    """Return whether two runs have the data and the first `at` rounds in common."""
    names = ("round", "cohort", "train_loss", "accuracy", "accuracy_cohort")
    rows = [[[row[name] for name in names] for row in each.history[:at]] for each in (run, branch)]
    return run.digests == branch.digests and rows[0] == rows[1]


def is_trunk(run: Run, branch: Run, at: int) -> bool:
    """Return whether `branch` may be a fork of `run` after round `at`, and not both of a third run."""
    return (forked_after(run) or 0) < at and run.done >= at and agree(run, branch, at)


def with_trunks(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, each fork with the run that it branched off, if that is among them.

    That run is told by the rounds in common; of several, by the name of its folder, which may have moved.
    """
    found: dict[int, Run] = {}
    for n in sorted(range(len(runs)), key=lambda n: forked_after(runs[n]) or 0):
        run, at = runs[n], forked_after(runs[n])
        name = Path(str(run.started_with("fork")["run"])).name if at else ""
        trunks = [other for other in found.values() if at and is_trunk(other, run, at)]
        trunks.sort(key=lambda other: other.path.resolve().name != name)
        found[n] = replace(run, trunk=trunks[0] if trunks else None)
    return [found[n] for n in range(len(runs))]
