"""A training job from start to exit code: new, or taken up from a checkpoint."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pfedmoe_mpi import checkpoint, comm, config, console, metrics
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.comm import Comm
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.errors import EXIT_DONE, EXIT_STOPPED, CheckpointError, ConfigError
from pfedmoe_mpi.launch import LOGGER, under_mpi
from pfedmoe_mpi.runfolder import RunFolder, default

# A restart repeats bits only if these stay as they were.
BITS = ("torch", "device", "threads", "precision")
# Asked for anew at every start.
ANEW = ("run.dir", "run.force", "run.singleton")


@dataclass
class Reporter:
    """Rank 0 writes the run folder and the terminal; the other ranks only log."""

    world: Comm
    folder: RunFolder
    settings: Config
    progress: console.Progress | None

    def round_done(self, row: metrics.Row) -> None:
        if self.progress:
            self.folder.append_metrics(row)
            self.progress.round_done(row)

    def dropped(self, round: int, clients: Sequence[int]) -> None:
        if clients:
            LOGGER.warning("round %d: left out clients %s, not finite", round, clients)
            if self.progress:
                self.folder.event("dropped", round=round, clients=list(clients))
                listed = ", ".join(map(str, clients))
                print(f"round {round}: left out clients {listed}: vectors that are not finite", flush=True)

    def written(self, path: Path, history: Sequence[metrics.Row], partial: bool) -> None:
        if not self.progress:
            return
        if not partial and history:
            every, last = self.settings.run.checkpoint_every, history[-1]["round"]
            saved = [r["round"] for r in history if r["round"] % every == 0 or r["round"] == last]
            top = metrics.best(history, saved)
            if top and top["round"] == last:
                self.folder.mark_best(path)
        self.folder.keep_newest(self.settings.run.keep)


def run(settings: Config, dry: bool) -> int:
    """A new run."""

    def work(world: Comm, code: str) -> int:
        folder = world.from_root(lambda: _new_folder(settings), "run folder")
        return _train(world, settings, folder, None, code, dry=dry)

    return under_mpi(work, settings.run.singleton)


def _new_folder(settings: Config) -> Path:
    path = Path(settings.run.dir).absolute() if settings.run.dir else default(settings.algorithm)
    RunFolder.refuse_existing(path, settings.run.force)
    return path


def restart(source: Path, overrides: Mapping[str, Any]) -> int:
    """Go on from a run folder's newest good checkpoint, or from one file."""

    def work(world: Comm, code: str) -> int:
        path, own, warnings = _choose(world, source)
        if world.rank == 0:
            for warning in warnings:
                print(f"warning: {warning}", file=sys.stderr, flush=True)
        with Checkpoint(path) if path else nullcontext() as loaded:
            toml = RunFolder(source.absolute()).config
            before = (
                loaded.config if loaded else world.from_root(lambda: config.read_toml(toml), "configuration")
            )
            settings, changes = continued(before, overrides, ("partition", "gate"))
            folder, again = world.from_root(lambda: _goes_on_in(source, own, settings), "run folder")
            settings = config.build({**config.flatten(config.to_tree(settings)), "run.dir": str(folder)})
            return _train(
                world, settings, folder, loaded, code, again=again, changes=changes, warnings=warnings
            )

    return under_mpi(work, str(overrides.get("run.singleton", "")).lower() == "true")


def _choose(world: Comm, source: Path) -> tuple[Path | None, Path | None, list[str]]:
    """(checkpoint or None for round 0, its folder if it may go on there, warnings), the same on all ranks."""
    folder = RunFolder(source.absolute())
    is_folder, found, in_folder = world.from_root(lambda: _candidates(source, folder), "checkpoints")
    warnings = []
    for path in found:
        try:
            world.agree(partial(checkpoint.verify, path, world.rank, world.size), "checking the checkpoint")
        except CheckpointError as error:
            if not is_folder:
                raise
            warnings.append(str(error).partition("\n")[0])
            continue
        return path, folder.path if is_folder else in_folder, warnings
    return None, folder.path, warnings


def _candidates(source: Path, folder: RunFolder) -> tuple[bool, list[Path], Path | None]:
    """Whether the source is a folder, the files to try in order, and the folder a file may go on in."""
    if not source.exists():
        raise CheckpointError(f"there is no run folder or checkpoint {source}", "check the path")
    if source.is_dir():
        found = checkpoint.newest_first(folder.checkpoints)
        if not found and not folder.config.is_file():
            problem = f"{source} is not a run folder: it has neither checkpoints nor config.toml"
            raise CheckpointError(problem, "check the path")
        return True, found, None
    source = source.absolute()
    run = RunFolder(source.parent.parent)
    is_newest = checkpoint.newest_first(run.checkpoints)[:1] == [source] and run.config.is_file()
    return False, [source], run.path if is_newest else None


def _goes_on_in(source: Path, own: Path | None, settings: Config) -> tuple[Path, bool]:
    """The folder to go on in, and whether it is the run's own, which only its newest checkpoint may have."""
    new = Path(settings.run.dir).absolute() if settings.run.dir else own
    if new is None or (own is None and new == source.absolute().parent.parent):
        raise CheckpointError(
            f"{source} is not the newest checkpoint of a run folder",
            "--run.dir NEW goes on from it in another one",
        )
    if new != own:
        RunFolder.refuse_existing(new, settings.run.force)
    return new, new == own


def continued(
    before: Mapping[str, Any], overrides: Mapping[str, Any], fixed: Sequence[str]
) -> tuple[Config, dict[str, list[Any]]]:
    """An earlier configuration with overrides, and what they change: {name: [before, after]}.

    What concerns one start only (run.dir, run.force, run.singleton) is taken from the overrides alone.

    Raises:
        ConfigError: an override that would make it another federation; `fixed` are more sections that do.
    """
    anew = {name: config.fields()[name].default for name in ANEW}
    old = config.build({**config.flatten(before), **anew})
    new = config.build({**config.flatten(config.to_tree(old)), **overrides})
    then, now = (config.flatten(config.to_tree(settings)) for settings in (old, new))
    names = [name for name in {**then, **now} if name not in ANEW and then.get(name) != now.get(name)]
    fixed = ("algorithm", "clients", "seed", "model", old.algorithm, *fixed)
    refused = [
        f"{name}: {then.get(name)} → {now.get(name)}" for name in names if name.partition(".")[0] in fixed
    ]
    if refused:
        problem = "this cannot be changed now: " + "; ".join(refused)
        raise ConfigError(problem, "leave it out, or start a new run with it")
    return new, {name: [then.get(name), now.get(name)] for name in names}


def _train(
    world: Comm,
    settings: Config,
    path: Path,
    loaded: Checkpoint | None,
    code: str,
    *,
    dry: bool = False,
    again: bool = False,
    changes: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
) -> int:
    """Build, tell, train. `again`: the folder exists and goes on."""
    from pfedmoe_mpi import federation as loop_room
    from pfedmoe_mpi import setup

    federation = setup.build(world, settings)
    settings = federation.config
    _compare(world, federation, loaded)
    lines = world.gather(f"{federation.device.line}, {len(federation.clients)} clients", "hosts")
    if world.rank == 0:
        print("\n".join(console.plan(federation, lines)), flush=True)
    if dry:
        return EXIT_DONE
    folder = RunFolder(path)
    history = loaded.history if loaded else []
    done = bool(loaded and loaded.round >= settings.rounds)
    if done:
        if world.rank == 0:
            print(f"the run is finished: {history[-1]['round']} of {settings.rounds} rounds are done")
        return EXIT_DONE
    world.from_root(lambda: _open_folder(folder, settings, history, again), "run folder")
    folder.log_to_file(world.rank)
    identity = {"code": code, **_identity(federation)}
    _started(world, folder, loaded, lines, {**identity, "changes": changes or {}, "warnings": list(warnings)})
    own = len(federation.clients)
    progress = console.Progress(settings.rounds, len(history), own) if world.rank == 0 else None
    loop = loop_room.Loop(world, federation, Reporter(world, folder, settings, progress), folder.checkpoints)
    loop.identity = identity
    if loaded:
        loop.resume(loaded)
    try:
        finished = loop.run()
    finally:
        if progress:
            progress.close()
    if world.rank == 0:
        _ended(world, folder, federation, loop, finished)
    return EXIT_DONE if finished else EXIT_STOPPED


def _compare(world: Comm, federation: Any, loaded: Checkpoint | None) -> None:
    """Refuse data or a partition other than the checkpoint's; say what makes bits differ."""
    if loaded is None:
        return
    for name, own in (("data", federation.data_digest), ("partition", federation.partition.digest())):
        then = loaded.identity[f"{name}_digest"]
        if own != then:
            raise CheckpointError(
                f"the {name} changed since the checkpoint: digest {then[:16]}… then, {own[:16]}… now",
                "restart with the same data, or start a new run",
            )
    now = _identity(federation)
    differing = [f"{k} {loaded.identity[k]} → {now[k]}" for k in BITS if loaded.identity[k] != now[k]]
    if differing and world.rank == 0:
        listed = "; ".join(differing)
        print(f"note: bits will differ from an uninterrupted run: {listed}", file=sys.stderr, flush=True)


def _identity(federation: Any) -> dict[str, str]:
    """What a run's bits depend on beside its configuration, for the checkpoint and for events.jsonl."""
    import h5py
    import numpy
    import torch

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "h5py": h5py.__version__,
        "mpi": comm.library(),
        "device": federation.device.model,
        "threads": str(federation.config.train.threads),
        "precision": federation.config.train.precision,
    }


def _open_folder(folder: RunFolder, settings: Config, history: Sequence[metrics.Row], again: bool) -> None:
    if again:
        folder.write_config(config.to_toml(settings))
    else:
        folder.create(config.to_toml(settings), settings.run.force)
    folder.rewrite_metrics(history)


def _started(
    world: Comm, folder: RunFolder, loaded: Checkpoint | None, lines: Sequence[str], facts: Mapping[str, Any]
) -> None:
    if world.rank == 0:
        source = {"checkpoint": loaded.path.name, "round": loaded.round} if loaded else {}
        folder.event("restart" if loaded else "start", ranks=world.size, hosts=list(lines), **source, **facts)
        print(f"run folder {folder.path}", flush=True)


def _ended(world: Comm, folder: RunFolder, federation: Any, loop: Any, finished: bool) -> None:
    folder.event("finish" if finished else "stop", round=loop.round, signal=world.signal_received)
    if finished:
        text = console.table(federation, loop.history)
        LOGGER.info("\n%s", text)
        print(text, flush=True)
    else:
        print(
            f"stopped after round {loop.round} with a checkpoint; go on with: restart {folder.path}",
            flush=True,
        )
