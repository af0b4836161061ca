"""`verify`: replay drawn rounds of a run from its checkpoints, compare every bit, and print a card.

The card states what a reader of a paper needs to repeat the run: its settings, versions and digests, and
which rounds were replayed here. Nothing is written into the run folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.checkpoint import Checkpoint, Opened
from pfedmoe_mpi.commands.verify import replayable, tables
from pfedmoe_mpi.commands.verify.card import Found, Replayed, card
from pfedmoe_mpi.commands.verify.replayable import FREE, Replay, Start
from pfedmoe_mpi.errors import EXIT_DONE, CheckpointError, ConfigError, RunError, StoppedError
from pfedmoe_mpi.federation import metrics, rebuilt
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.mpi.session import under_mpi
from pfedmoe_mpi.names import check_reachable
from pfedmoe_mpi.run.evaluate import evaluation_loop
from pfedmoe_mpi.run.folder import RunFolder
from pfedmoe_mpi.run.restart import override_settings

if TYPE_CHECKING:  # it imports torch, which is imported only after the arguments were checked
    from pfedmoe_mpi.federation.loop import Loop

PLACES = ("data.path", "partition.file")  # where a restart may have said that files are now
ALWAYS = ("cohort", "dropped", "lost", "late", "train_loss")  # in a row whose clients were not measured, too


def run(folder: Path, rounds: int, overrides: Mapping[str, Any]) -> int:
    """Replay `rounds` rounds and print the card; return the exit code.

    Raises:
        UserError: on all ranks: the folder is not that of a run, has no usable checkpoint, or none from which
            a round can be replayed; the data are missing or others; or an override would change the numbers.
        RunError: on all ranks: a round differs, or the tables of the run folder do from its last checkpoint.
    """
    changed = [name for name in overrides if not name.startswith(FREE)]
    if changed:
        problem = f"verify replays a run with its own settings, not with another {', '.join(changed)}"
        others = "--data.path, --partition.file and --run.code may lead to other places"
        raise ConfigError(problem, f"remove these flags; {others}")
    given = {"command": "verify", "--rounds": rounds, **overrides}
    return under_mpi(lambda world, _: _verify(world, folder, rounds, overrides), given, singleton=True)


def _verify(world: Comm, source: Path, rounds: int, overrides: Mapping[str, Any]) -> int:
    folder = RunFolder(world.from_root(source.absolute, "source"))  # ranks may be in unlike folders
    world.from_root(lambda: _check_source(folder), "source")
    kept = replayable.open_kept(world, folder)
    lineage = world.from_root(folder.lineage, "events")
    starts = replayable.with_beginning(kept, lineage)
    lengths = replayable.reach(starts, lineage)
    world.from_root(lambda: replayable.check_any(folder, starts, lengths), "what can be replayed")
    plan = world.from_root(lambda: replayable.plan(lengths, rounds), "plan")
    with checkpoint.load_everywhere(world, _files(kept[max(kept)])) as last:
        results = [each for replay in plan for each in _replay(world, starts, replay, last, overrides)]
        files = world.from_root(lambda: tables.differences(folder, last.history), "tables")
        left = replayable.out_of_reach(lengths)
        if world.rank == 0:
            print(card(Found(last, lineage, results, world.size, left, files)), flush=True)
    _check_same(folder, results, files)
    return EXIT_DONE


def _check_source(folder: RunFolder) -> None:
    """Raise CheckpointError unless this is the folder of a run."""
    path, above = folder.path, RunFolder(folder.path.parent.parent)
    check_reachable(path, CheckpointError)
    if not path.exists():
        raise CheckpointError(f"there is no run folder {path}", "check the path")
    if not path.is_dir():
        of_run = path.parent.name == "checkpoints" and above.resumable
        remedy = f"verify {above.path}" if of_run else "name the folder of a run"
        raise CheckpointError(f"{path} is a file, and verify replays the run of a folder", remedy)
    if not folder.resumable:
        problem = f"{path} is not a run folder: it has neither checkpoints nor config.toml"
        raise CheckpointError(problem, "name the folder of a run, in which its config.toml is")


def _check_same(folder: RunFolder, results: Sequence[Replayed], files: Sequence[str]) -> None:
    """Raise RunError if a round differs, or what reports read of the run."""
    different = [each.round for each in results if each.differences]
    if different:
        listed = ", ".join(map(str, different))
        raise RunError(
            f"round {listed} of {folder.path} gave other numbers when replayed",
            "compare the versions, the processor and the threads on the card with those of this machine",
        )
    if files:
        listed = "; ".join(files)
        raise RunError(
            f"metrics.jsonl and measured of {folder.path} differ from its last checkpoint in {listed}",
            f"mv {folder.metrics} {folder.metrics}.old; `restart {folder.path}` then writes both again",
        )


def _files(start: Start) -> Opened:
    assert start.files, "only the start before round 1 has none"
    return start.files


def _replay(
    world: Comm, starts: Mapping[int, Start], replay: Replay, last: Checkpoint, overrides: Mapping[str, Any]
) -> Iterator[Replayed]:
    """Train the rounds after a start again and compare each with the run's row; collective.

    Where the run kept a checkpoint of the round, the vectors are compared too.
    """
    begin, newest = starts[replay.after], starts[max(starts)].settings
    moved = {name: newest[name] for name in PLACES if newest.get(name) != begin.settings.get(name)}
    overrides = {**moved, **overrides}
    if begin.files:
        with checkpoint.load_everywhere(world, begin.files) as loaded:
            loop = _resumed(world, loaded, overrides)
    else:
        loop = _started(world, begin, last, overrides)
    if not loop.begin():
        raise StoppedError
    for _ in range(replay.rounds):
        if not loop.run_round():
            raise StoppedError
        names = world.from_root(
            lambda: _differences(last.history[loop.round - 1], loop.history[-1]), "metrics"
        )
        compared = "metrics"
        if loop.round in starts:
            names += _unlike_vectors(world, loop, _files(starts[loop.round]))
            compared = "metrics and all vectors"
        yield Replayed(loop.round, compared, names)


def _resumed(world: Comm, loaded: Checkpoint, overrides: Mapping[str, Any]) -> Loop:
    """Return a loop that continues from a checkpoint."""
    from pfedmoe_mpi.run.identity import check_same_federation

    loop = evaluation_loop(world, loaded, overrides)
    check_same_federation(world, loop.federation, loaded)
    return loop


def _started(world: Comm, begin: Start, last: Checkpoint, overrides: Mapping[str, Any]) -> Loop:
    """Return a loop before round 1, with the code, data and partition of the last checkpoint."""
    from pfedmoe_mpi.federation.build import build
    from pfedmoe_mpi.federation.loop import Loop, SilentObserver
    from pfedmoe_mpi.run.identity import check_same_federation

    before = {**begin.settings, **overrides}
    settings, _ = world.attempt(lambda: override_settings(before, overrides, ()), "settings")
    federation = build(world, settings, warn=False)
    check_same_federation(world, federation, last)
    return Loop(world, federation, SilentObserver(), None)


# What is compared


def _differences(recorded: Mapping[str, Any], replayed: metrics.Row) -> list[str]:
    """Return the names of a row that differ, of those that repeat bit for bit."""
    before, now = metrics.learning(dict(recorded)), metrics.learning(replayed)
    # A restart that changed `rounds` or `eval.*` may have measured other clients.
    measured = [[value is None for value in row["clients"]["accuracy"]] for row in (before, now)]
    # A row of an earlier version has fewer names, and fewer numbers of clients.
    now["clients"] = {name: now["clients"].get(name) for name in before["clients"]}
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
