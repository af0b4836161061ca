"""The card of `verify`: a table in Markdown for a paper's appendix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pfedmoe_mpi import config, user_code
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.commands import inspect
from pfedmoe_mpi.commands.verify.replayable import FREE, Event, origins
from pfedmoe_mpi.run import privacy_lines

IDENTITY = ("code", "python", "torch", "numpy", "h5py", "mpi", "device", "threads", "precision")


@dataclass(frozen=True)
class Replayed:
    """What a replayed round was compared with, and the names of what differs."""

    round: int
    compared: str
    differences: Sequence[str]


@dataclass(frozen=True)
class Found:
    """What `verify` found of a run.

    Attributes:
        last: the run's last checkpoint.
        lineage: the starts that the rounds come from.
        replayed: the rounds that were replayed, on `ranks` ranks.
        left: stretches of rounds that cannot be replayed.
        files: what differs between the run folder's tables and the last checkpoint.
    """

    last: Checkpoint
    lineage: Sequence[Event]
    replayed: Sequence[Replayed]
    ranks: int
    left: Sequence[range]
    files: Sequence[str]


def card(found: Found) -> str:
    """Return the card as a table in Markdown."""
    facts = [*_facts(found.last), *_origins(found.lineage), *_results(found)]
    lines = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in facts]
    return "\n".join(["| run | |", "|---|---|", *lines])


def _facts(last: Checkpoint) -> Iterator[tuple[str, Any]]:
    """Yield the settings, the accuracy, versions and digests."""
    row, secret = last.history[-1], _seed_is_secret(last.history)
    yield "method", user_code.label(last.config["algorithm"])
    yield "rounds", f"{last.round} of {last.config['rounds']}"
    accuracy = row["accuracy"]
    yield "accuracy", f"mean {_percent(accuracy['mean'])}, worst client {_percent(accuracy['worst'])}"
    own = _own_settings(last.config)
    listed = ", ".join(f"{name} = {own[name]}" for name in sorted(own) if name != "seed" or not secret)
    yield "settings that differ from the default", listed
    if secret:
        yield "seed", "left out: whoever knows it can draw the noise again, and ε does not hold"
    if row.get("privacy"):
        yield "privacy", privacy_lines.line(row["privacy"], last.round).removeprefix("privacy: ")
    yield "data, SHA-256", last.identity["data_digest"]
    yield "partition, SHA-256", last.identity["partition_digest"]
    yield from ((f"own code, {name}, SHA-256", digest) for name, digest in user_code.digests(last.code))
    yield from ((name, last.identity[name]) for name in IDENTITY if name in last.identity)
    yield f"result after round {last.round}, SHA-256", inspect.digest(last)


def _own_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings on which numbers depend and that are not the default."""
    fields = config.fields(settings["algorithm"])
    defaults = {name: _plain(field.default) for name, field in fields.items()}
    return {
        name: value
        for name, value in config.flatten(settings).items()
        if name != "algorithm" and not name.startswith(FREE) and value != defaults.get(name)
    }


def _seed_is_secret(history: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a round had the noise of differential privacy, which the seed draws."""
    return any(row["privacy"].get("noise") for row in history if row.get("privacy"))


def _origins(lineage: Sequence[Event]) -> Iterator[tuple[str, str]]:
    """Yield a line for each start that changed what followed, without which nobody can repeat the run."""
    for done, within, text in origins(lineage):
        yield f"from {'within ' * within}round {done + 1} on", text


def _results(found: Found) -> Iterator[tuple[str, str]]:
    """Yield what was compared, and what cannot be replayed."""
    for each in found.replayed:
        unlike = ", ".join(each.differences)
        verdict = f"differs in {unlike}" if unlike else f"the same bits ({each.compared})"
        yield f"round {each.round}, replayed on {found.ranks} rank{'s' * (found.ranks > 1)}", verdict
    if found.left:
        stretches = (f"{each[0]} to {each[-1]}" if len(each) > 1 else str(each[0]) for each in found.left)
        yield "rounds that cannot be replayed", f"{', '.join(stretches)}: no checkpoint leads to them"
    unlike = "; ".join(found.files)
    yield "metrics.jsonl and measured", f"differs in {unlike}" if unlike else "as the last checkpoint"


def _plain(value: Any) -> Any:
    """Return a default as checkpoints have it."""
    return list(value) if isinstance(value, tuple) else value


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.2f} %"
