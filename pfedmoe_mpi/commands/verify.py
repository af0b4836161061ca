"""`verify`: replay drawn rounds of a run from its checkpoints, compare every bit, and print a card.

The card states what a reader of a paper needs to repeat the run: its settings, versions and digests, and
which rounds were replayed here. Nothing is written into the run folder.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pfedmoe_mpi import checkpoint, config
from pfedmoe_mpi.checkpoint import Checkpoint, Opened
from pfedmoe_mpi.commands import inspect
from pfedmoe_mpi.errors import EXIT_DONE, CheckpointError, ConfigError, RunError, StoppedError
from pfedmoe_mpi.federation import metrics, rebuilt
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.mpi.session import under_mpi
from pfedmoe_mpi.run import privacy_lines
from pfedmoe_mpi.run.evaluate import evaluation_loop
from pfedmoe_mpi.run.folder import RunFolder
from pfedmoe_mpi.user_code import label

if TYPE_CHECKING:  # it imports torch, which is imported only after the arguments were checked
    from pfedmoe_mpi.federation.loop import Loop

IDENTITY = ("code", "python", "torch", "numpy", "h5py", "mpi", "device", "threads", "precision")
FREE = ("run.", "data.path", "model.weights")  # what the numbers do not depend on
ALWAYS = ("cohort", "dropped", "lost", "late", "train_loss")  # in a row whose clients were not measured, too


@dataclass(frozen=True)
class Source:
    """The start of a replay: `after` complete rounds, and `rounds` that can be replayed from there."""

    after: int
    rounds: int


@dataclass(frozen=True)
class Replayed:
    """What a replayed round was compared with, and the names of what differs."""

    round: int
    compared: str
    differences: Sequence[str]


def run(folder: Path, rounds: int, overrides: Mapping[str, Any]) -> int:
    """Replay `rounds` rounds and print the card; return the exit code.

    Raises:
        UserError: on all ranks: the folder has no usable checkpoint, the data are missing or others, or an
            override would change the numbers.
        RunError: on all ranks: a round differs.
    """
    changed = [name for name in overrides if not name.startswith(FREE)]
    if changed:
        problem = f"verify replays a run with its own settings, not with another {', '.join(changed)}"
        raise ConfigError(problem, "remove these flags; --data.path and --run.code may lead to other places")
    given = {"command": "verify", "--rounds": rounds, **overrides}
    return under_mpi(lambda world, _: _verify(world, folder, rounds, overrides), given, singleton=True)


def _verify(world: Comm, path: Path, rounds: int, overrides: Mapping[str, Any]) -> int:
    folder = RunFolder(world.from_root(path.absolute, "source"))  # ranks may be in unlike folders
    kept = _open_kept(world, folder)
    plan = world.from_root(lambda: _plan(folder, kept, rounds), "plan")
    with checkpoint.load_everywhere(world, kept[max(kept)]) as last:
        results = [
            each for source in plan for each in _replay(world, folder, kept, source, last.history, overrides)
        ]
        if world.rank == 0:
            print(_card(last, results, world.size), flush=True)
    different = [each.round for each in results if each.differences]
    if different:
        listed = ", ".join(map(str, different))
        raise RunError(
            f"round {listed} of {folder.path} gave other numbers when replayed",
            "compare the versions, the processor and the threads on the card with those of this machine",
        )
    return EXIT_DONE


def _open_kept(world: Comm, folder: RunFolder) -> dict[int, Opened]:
    """Return the files of the run's complete checkpoints by round; collective.

    They are open from now on, because the run may still write checkpoints and remove others.
    """
    paths = world.from_root(
        lambda: [folder.best, *checkpoint.restart_points(folder.checkpoints)], "checkpoints"
    )
    kept = {}
    for path in (path for path in paths if "partial" not in path.stem):
        try:
            files = checkpoint.open_files_everywhere(world, path)
        except CheckpointError:
            if world.from_root(path.exists, "checkpoint"):
                raise
            continue
        kept[world.from_root(partial(_round_of, files), "round")] = files
    return kept


def _round_of(files: Opened) -> int:
    with Checkpoint(files) as loaded:
        return loaded.round


# What is replayed


def _plan(folder: RunFolder, kept: Collection[int], rounds: int) -> list[Source]:
    """Return the starts from which `rounds` rounds are replayed, where checkpoints of these are kept.

    Rounds that follow a checkpoint, or the start, at once are drawn first: they cost one round each.

    Raises:
        CheckpointError: the folder has no complete checkpoint.
    """
    done = max(kept, default=0)
    if not done:
        problem = f"{folder.path} has no checkpoint of a complete round"
        raise CheckpointError(problem, "name the folder of a run that has trained")
    begin = [] if folder.changed_settings() else [0]  # from the settings, before round 1
    starts = sorted({*begin, *kept})
    ends = [*starts[1:], done]
    gaps = {start: end - start for start, end in zip(starts, ends, strict=True)}
    chosen = dict.fromkeys(starts, 0)
    for distance in range(1, max(gaps.values()) + 1):
        left = rounds - sum(chosen.values())
        reachable = [start for start, gap in gaps.items() if gap >= distance]
        for start in random.sample(reachable, min(left, len(reachable))):
            chosen[start] = distance
    return [Source(start, length) for start, length in chosen.items() if length]


def _replay(
    world: Comm,
    folder: RunFolder,
    kept: Mapping[int, Opened],
    source: Source,
    history: Sequence[Mapping[str, Any]],
    overrides: Mapping[str, Any],
) -> Iterator[Replayed]:
    """Train the rounds after a start again and compare each with the run's row; collective.

    Where the run kept a checkpoint of the round, the vectors are compared too.
    """
    begin = kept.get(source.after)
    with checkpoint.load_everywhere(world, begin) if begin else nullcontext() as loaded:
        loop = _resumed(world, loaded, overrides) if loaded else _started(world, folder, overrides)
    if not loop.begin():
        raise StoppedError
    for _ in range(source.rounds):
        if not loop.run_round():
            raise StoppedError
        names = world.from_root(lambda: _differences(history[loop.round - 1], loop.history[-1]), "metrics")
        compared = "metrics"
        if loop.round in kept:
            names += _unlike_vectors(world, loop, kept[loop.round])
            compared = "metrics and all vectors"
        yield Replayed(loop.round, compared, names)


def _resumed(world: Comm, loaded: Checkpoint, overrides: Mapping[str, Any]) -> Loop:
    """Return a loop that continues from a checkpoint."""
    from pfedmoe_mpi.run.identity import check_same_federation

    loop = evaluation_loop(world, loaded, overrides)
    check_same_federation(world, loop.federation, loaded)
    return loop


def _started(world: Comm, folder: RunFolder, overrides: Mapping[str, Any]) -> Loop:
    """Return a loop before round 1."""
    from pfedmoe_mpi.federation.build import build
    from pfedmoe_mpi.federation.loop import Loop, SilentObserver

    before = world.from_root(lambda: config.read_toml(folder.config), "configuration")
    settings = world.attempt(lambda: config.build({**before, **overrides}), "settings")
    return Loop(world, build(world, settings, warn=False), SilentObserver(), None)


# What is compared


def _differences(recorded: Mapping[str, Any], replayed: metrics.Row) -> list[str]:
    """Return the names of a row that differ, of those that repeat bit for bit."""
    before, now = metrics.learning(dict(recorded)), metrics.learning(replayed)
    # A restart that changed `rounds` or `eval.*` may have measured other clients.
    measured = [[value is None for value in row["clients"]["accuracy"]] for row in (before, now)]
    # A row of an earlier version has fewer names.
    names = before.keys() if measured[0] == measured[1] else ALWAYS
    return sorted(name for name in names if before.get(name) != now.get(name))


def _unlike_vectors(world: Comm, loop: Loop, kept: Opened) -> list[str]:
    """Return which vectors differ from those of a checkpoint of the same round; collective."""
    with checkpoint.load_everywhere(world, kept) as loaded:
        unlike = [] if _same_bits(loaded.state, loop.state) else ["the server's vector"]
        vector, store = rebuilt.vectors(loaded), loop.federation.store
        for client in loop.federation.clients:
            changed = loaded.has_trained(client) or store.holds(client)  # others are drawn, here and there
            if changed and not _same_bits(vector(client), store.values(client)):
                unlike.append(f"the vector of client {client}")
        return sorted({name for part in world.gather(unlike, "vectors") for name in part})


def _same_bits(one: Any, other: Any) -> bool:
    """Return whether two float32 vectors agree in every bit; NaN stands for what is not defined yet."""
    return np.array_equal(np.asarray(one).view(np.uint32), np.asarray(other).view(np.uint32))


# The card


def _card(last: Checkpoint, results: Sequence[Replayed], ranks: int) -> str:
    """Return the card as a table in Markdown."""
    fields = config.fields(last.config["algorithm"])
    defaults = {name: _plain(field.default) for name, field in fields.items()}
    own = {
        name: value
        for name, value in config.flatten(last.config).items()
        if name != "algorithm" and not name.startswith(FREE) and value != defaults.get(name)
    }
    row, privacy = last.history[-1]["accuracy"], last.history[-1].get("privacy")
    facts = {
        "method": label(last.config["algorithm"]),
        "rounds": f"{last.round} of {last.config['rounds']}",
        "accuracy": f"mean {_percent(row['mean'])}, worst client {_percent(row['worst'])}",
        "settings that differ from the default": ", ".join(f"{name} = {own[name]}" for name in sorted(own)),
        **({"privacy": privacy_lines.line(privacy, last.round).removeprefix("privacy: ")} if privacy else {}),
        "data, SHA-256": last.identity["data_digest"],
        "partition, SHA-256": last.identity["partition_digest"],
        **{name: last.identity[name] for name in IDENTITY if name in last.identity},
        f"result after round {last.round}, SHA-256": inspect.digest(last),
    }
    for each in results:
        unlike = ", ".join(each.differences)
        verdict = f"differs in {unlike}" if unlike else f"the same bits ({each.compared})"
        facts[f"round {each.round}, replayed on {ranks} rank{'s' * (ranks > 1)}"] = verdict
    lines = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in facts.items()]
    return "\n".join(["| run | |", "|---|---|", *lines])


def _plain(value: Any) -> Any:
    """Return a default as checkpoints have it."""
    return list(value) if isinstance(value, tuple) else value


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.2f} %"
