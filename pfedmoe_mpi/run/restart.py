"""Resuming a run: from which checkpoint, with which settings changed, in which folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfedmoe_mpi import checkpoint, config, environment
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.errors import CheckpointError, ConfigError
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.mpi.session import under_mpi
from pfedmoe_mpi.run import job
from pfedmoe_mpi.run.folder import RunFolder

if TYPE_CHECKING:  # it imports torch, which is imported only when the arguments are known to be right
    from pfedmoe_mpi.federation.loop import Loop

# What a restart may not change, beside what an evaluation may not: who trains, when, and on what.
FIXED_IN_TRAINING = ("partition", "gate", "unseen", "join", "stream", "data.mean", "data.std")
PER_START = ("run.dir", "run.force", "run.singleton")  # never taken from an earlier start


def restart(source: Path, overrides: Mapping[str, Any]) -> int:
    """Resume from a run folder's newest good checkpoint, or from one file; return the exit code."""
    end = environment.slurm_end() if environment.launched_rank() == 0 else None
    singleton = str(overrides.get("run.singleton", "")).lower() == "true"
    return under_mpi(lambda world, code: resume(world, source, overrides, code, end), singleton)


def resume(world: Comm, source: Path, overrides: Mapping[str, Any], code: str, end: float | None) -> int:
    """Resume a run and train on; collective. Arguments as of `job.begin`."""
    with _folder_of(source) as folder:
        world.from_root(lambda: folder.lock() if _stays(source, folder, overrides) else None, "lock")
        path, run_path, warnings = choose(world, source)
        if world.rank == 0:
            for warning in warnings:
                print(f"warning: {warning}", file=sys.stderr, flush=True)
        with checkpoint.open_everywhere(world, path) if path else nullcontext() as loaded:
            before = loaded.config if loaded else _read_config(world, folder)
            settings, changes = continued(before, overrides, FIXED_IN_TRAINING)
            if loaded:
                _check_progress(world, loaded, settings, changes)
            world.stop_at = environment.stop_at(settings.run.walltime, end)
            target, resuming = world.from_root(lambda: _target(source, run_path, settings), "run folder")
            settings = config.build({**config.flatten(config.to_tree(settings)), "run.dir": str(target)})
            with folder if resuming else RunFolder(target) as target_folder:
                start = job.Start(
                    settings,
                    target_folder,
                    code,
                    loaded=loaded,
                    resuming=resuming,
                    changes=changes,
                    warnings=warnings,
                )
                return job.train(world, start)


def _read_config(world: Comm, folder: RunFolder) -> dict[str, Any]:
    return world.from_root(lambda: config.read_toml(folder.config), "configuration")


def _check_progress(
    world: Comm, loaded: Checkpoint, settings: Config, changes: Mapping[str, Sequence[Any]]
) -> None:
    """Refuse to change what is done already; print what changed rounds make of a schedule."""
    if loaded.partial is not None and "participation" in changes:
        before = changes["participation"][0]
        raise ConfigError(
            f"round {loaded.round + 1} is in progress, its cohort was drawn with participation = {before}",
            "remove --participation until the round is done, or resume from an earlier checkpoint "
            "with --run.dir NEW",
        )
    if "rounds" in changes and settings.rounds < loaded.round:
        raise ConfigError(
            f"rounds = {settings.rounds}, but {loaded.round} rounds are done; --rounds is the total",
            f"--rounds {loaded.round + settings.rounds} trains {settings.rounds} more",
        )
    schedule = settings.train.schedule
    if world.rank == 0 and "rounds" in changes and schedule != "constant":
        before, now = changes["rounds"]
        text = (
            f"the {schedule} schedule now ends at round {now} instead of {before}, so the learning rate jumps"
        )
        print(f"note: {text}", file=sys.stderr, flush=True)


def _folder_of(source: Path) -> RunFolder:
    """Return the run folder that a source is, or lies in as a checkpoint."""
    source = source.absolute()
    return RunFolder(source if source.is_dir() else source.parent.parent)


def _stays(source: Path, folder: RunFolder, overrides: Mapping[str, Any]) -> bool:
    """Return whether the restart will write into the run folder that its source belongs to."""
    new = overrides.get("run.dir")
    is_run = folder.config.is_file() or folder.checkpoints.is_dir()
    return is_run and source.exists() and (not new or Path(new).absolute() == folder.path)


def choose(world: Comm, source: Path) -> tuple[Path | None, Path | None, list[str]]:
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


def _target(source: Path, own: Path | None, settings: Config) -> tuple[Path, bool]:
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
        ConfigError: an override that would make it another federation; `fixed` are more sections or settings
            that do.
    """
    anew = {name: config.fields()[name].default for name in PER_START}
    old = config.build({**config.flatten(before), **anew})
    new = config.build({**config.flatten(config.to_tree(old)), **overrides})
    then, now = (config.flatten(config.to_tree(settings)) for settings in (old, new))
    names = [name for name in {**then, **now} if name not in PER_START and then.get(name) != now.get(name)]
    fixed = ("algorithm", "clients", "seed", "model", old.algorithm, *fixed)
    refused = [
        f"{name}: {then.get(name)} → {now.get(name)}"
        for name in names
        if name in fixed or name.partition(".")[0] in fixed
    ]
    if refused:
        problem = "this cannot be changed now: " + "; ".join(refused)
        raise ConfigError(problem, "leave it out, or start a new run with it")
    return new, {name: [then.get(name), now.get(name)] for name in names}


def evaluation_loop(world: Comm, loaded: Checkpoint, overrides: Mapping[str, Any]) -> Loop:
    """Return a loop over a verified checkpoint's federation, to measure and not to train; collective.

    Raises:
        UserError: on all ranks: data that are not there, or that its models do not take.
    """
    from pfedmoe_mpi.federation.build import build
    from pfedmoe_mpi.federation.loop import Loop, SilentObserver

    settings, _ = continued(loaded.config, overrides, ())
    federation = build(world, settings)
    layouts = [loaded.state_layout, *map(loaded.layout, range(loaded.clients))]
    fitting = [federation.state_layout, *federation.client_layouts]
    if [layout.digest for layout in layouts] != [layout.digest for layout in fitting]:
        raise CheckpointError(
            f"the checkpoint's models do not take samples of {'×'.join(map(str, federation.task.shape))} in "
            f"{federation.task.classes} classes",
            "give --data.path of data like those it was trained on",
        )
    if federation.task.vocabulary and federation.data_digest != loaded.identity["data_digest"]:
        raise CheckpointError(
            "these are not the texts of the training, and a model's tokens are those of its training rows",
            "evaluate on the data it was trained on",
        )
    loop = Loop(world, federation, SilentObserver(), None)
    loop.resume(loaded)
    return loop
