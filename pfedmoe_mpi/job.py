"""A training job from start to exit code: new, or taken up from a checkpoint."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfedmoe_mpi import __version__, checkpoint, comm, config, console, metrics
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.comm import Comm
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USER, CheckpointError, ConfigError, UserError
from pfedmoe_mpi.runfolder import LOGGER, RunFolder, default

# A restart repeats bits only if these stay as they were.
BITS = ("torch", "device", "threads", "precision")


def code_version() -> str:
    """Version, commit and dirty flag; asked for before MPI starts, which does not allow a subprocess later."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return __version__
    ask = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    found = subprocess.run(ask, capture_output=True, text=True, check=False, timeout=20)
    return f"{__version__} {found.stdout.strip()}".strip()


def under_mpi(work: Callable[[Comm, str], int], singleton: bool = False) -> int:
    """Start MPI, do `work(world, code version)`, leave together.

    A UserError is met by all ranks and told by one; anything else ends the whole job at once with this rank's
    traceback.
    """
    code = code_version() if comm.launched_rank() == 0 else ""
    world = comm.start(singleton)
    world.catch_signals()
    try:
        result = work(world, code)
    except UserError as error:
        if world.rank == 0:
            LOGGER.error(str(error))
            print(f"error: {error}", file=sys.stderr, flush=True)
        result = EXIT_USER
    except BaseException as error:
        LOGGER.exception("the job ends")
        world.fault(error)
    world.finish()
    return result


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
                print(f"round {round}: left out clients {list(clients)}, their vectors are not finite", flush=True)

    def written(self, path: Path, history: Sequence[metrics.Row], partial: bool) -> None:
        if not self.progress:
            return
        if not partial and history:
            every, last = self.settings.run.checkpoint_every, history[-1]["round"]
            top = metrics.best(history, [r["round"] for r in history if r["round"] % every == 0 or r["round"] == last])
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
        path, folder, warnings = _choose(world, source)
        if world.rank == 0:
            for warning in warnings:
                print(f"warning: {warning}", file=sys.stderr, flush=True)
        if path is None:
            settings = _from_toml(source, overrides)
            return _train(world, settings, source.absolute(), None, code, again=True, warnings=warnings)
        with Checkpoint(path) as loaded:
            settings, changes = _continued(loaded, overrides)
            new = folder is None
            if new:
                folder = world.from_root(lambda: _other_folder(path, settings), "run folder")
            assert folder is not None
            settings = config.build({**config.flatten(config.to_tree(settings)), "run.dir": str(folder)})
            return _train(
                world, settings, folder, loaded, code, again=not new, changes=changes, warnings=warnings
            )

    return under_mpi(work, str(overrides.get("run.singleton", "")).lower() == "true")


def _choose(world: Comm, source: Path) -> tuple[Path | None, Path | None, list[str]]:
    """(checkpoint or None for round 0, folder or None for a new one, warnings), the same on all ranks."""
    folder = RunFolder(source.absolute())
    is_folder, found, in_folder = world.from_root(lambda: _candidates(source, folder), "checkpoints")
    warnings = []
    for path in found:
        try:
            world.agree(lambda path=path: checkpoint.verify(path, world.rank, world.size), "checking the checkpoint")
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
            raise CheckpointError(f"{source} is not a run folder: it has neither checkpoints nor config.toml", "check the path")
        return True, found, None
    newest = checkpoint.newest_first(source.absolute().parent)[:1]
    own = source.absolute().parent.parent if newest == [source.absolute()] else None
    return False, [source.absolute()], own


def _other_folder(path: Path, settings: Config) -> Path:
    """A file that is not the newest of its folder goes on in a new one."""
    old = path.parent.parent
    if not settings.run.dir or Path(settings.run.dir).absolute() == old:
        raise CheckpointError(
            f"{path} is not the newest checkpoint of its run", "--run.dir NEW goes on from it in another folder"
        )
    RunFolder.refuse_existing(Path(settings.run.dir).absolute(), settings.run.force)
    return Path(settings.run.dir).absolute()


def _from_toml(source: Path, overrides: Mapping[str, Any]) -> Config:
    path = RunFolder(source.absolute()).config
    return config.build({**config.read_toml(path), **overrides, "run.dir": str(source.absolute())})


def _continued(loaded: Checkpoint, overrides: Mapping[str, Any]) -> tuple[Config, dict[str, list[Any]]]:
    """The checkpoint's configuration with the overrides, and what they change: {name: [before, after]}.

    Raises:
        ConfigError: an override that would make it another federation.
    """
    before = config.flatten(loaded.config)
    settings = config.build({**before, **overrides})
    after = config.flatten(config.to_tree(settings))
    changes = {name: [before.get(name), value] for name, value in after.items() if before.get(name) != value}
    fixed = ("clients", "seed", "algorithm", "partition.", "model.", "gate.", f"{loaded.config['algorithm']}.")
    refused = [f"{name}: {old} → {new}" for name, (old, new) in changes.items() if name.startswith(fixed)]
    if refused:
        raise ConfigError(
            "a restart cannot change " + "; ".join(refused), "leave that out, or start a new run with it"
        )
    return settings, changes


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
    import os

    from pfedmoe_mpi import device

    os.environ["OMP_NUM_THREADS"] = str(device.threads(world, settings.train.threads))
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
    done = bool(loaded and loaded.round >= settings.rounds)
    if done:
        if world.rank == 0:
            print(f"the run is finished: {loaded.round if loaded else 0} of {settings.rounds} rounds are done")
        return EXIT_DONE
    history = loaded.history if loaded else []
    world.from_root(lambda: _open_folder(folder, settings, history, again), "run folder")
    folder.log_to_file(world.rank)
    identity = {"code": code, **_identity(federation)}
    _started(world, folder, loaded, lines, {**identity, "changes": changes or {}, "warnings": list(warnings)})
    progress = console.Progress(settings.rounds, len(history), len(federation.clients)) if world.rank == 0 else None
    loop = loop_room.Loop(world, federation, Reporter(world, folder, settings, progress), folder.checkpoints)
    loop.identity = identity
    if loaded:
        loop.resume(loaded)
    try:
        finished = loop.run()
    finally:
        if progress:
            progress.close()
    _ended(world, folder, federation, loop.history, loop.round, finished)
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
        print(f"note: bits will differ from an uninterrupted run: {'; '.join(differing)}", file=sys.stderr, flush=True)


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


def _ended(
    world: Comm, folder: RunFolder, federation: Any, history: Sequence[metrics.Row], round: int, finished: bool
) -> None:
    if world.rank:
        return
    folder.event("finish" if finished else "stop", round=round, signal=world.signal_received)
    if finished:
        text = console.table(federation, history)
        LOGGER.info("\n%s", text)
        print(text, flush=True)
    else:
        print(f"stopped after round {round} with a checkpoint; go on with: restart {folder.path}", flush=True)
