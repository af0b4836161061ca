"""Resuming a run: from which checkpoint, with which settings changed, in which folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pfedmoe_mpi import checkpoint, config, environment
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.errors import CheckpointError, ConfigError
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.mpi.session import under_mpi
from pfedmoe_mpi.names import check_reachable
from pfedmoe_mpi.run import job
from pfedmoe_mpi.run.folder import RunFolder
from pfedmoe_mpi.run.place import holds_anything, refuse_existing
from pfedmoe_mpi.storage.untrusted_json import UnusableError

# A restart may not change these, in addition to what an evaluation may not: who trains, when, on which data.
FIXED_IN_TRAINING = (
    *("partition", "gate", "unseen", "join", "stream", "data.mean", "data.std"),
    "server.optimiser",  # checkpoints hold what it keeps from round to round
    *(f"privacy.{name}" for name in ("unit", "clip", "noise", "epsilon", "delta", "sampling")),
)
# With differential privacy, ε of the rounds so far is computed from these.
FIXED_WITH_CLIENTS = ("participation",)
FIXED_WITH_EPSILON = ("rounds",)  # for which the noise was chosen
FIXED_WITH_SAMPLES = (
    *FIXED_WITH_CLIENTS,
    *(f"train.{name}" for name in ("epochs", "steps", "batch", "accumulate")),
)
# Files may move: the checkpoint has the digest of what they hold.
MOVABLE = ("partition.file",)
# Never taken from an earlier start.
PER_START = ("run.dir", "run.force", "run.singleton", "run.code", "run.changed_code", "run.scratch")


def restart(source: Path, overrides: Mapping[str, Any], dry: bool) -> int:
    """Resume from a run folder's newest good checkpoint, or from one file; return the exit code.

    With `dry` only print the plan.
    """
    end = environment.slurm_end() if environment.launched_rank() == 0 else None
    singleton = str(overrides.get("run.singleton", "")).lower() == "true"
    given = {"command": "restart", "--dry": dry, **overrides}
    return under_mpi(lambda world, code: resume(world, source, overrides, code, end, dry), given, singleton)


def resume(
    world: Comm,
    source: Path,
    overrides: Mapping[str, Any],
    code: str,
    end: float | None,
    dry: bool = False,
) -> int:
    """Resume a run and train its remaining rounds; collective. `code`, `end`, `dry`: as for `job.begin`."""
    source, path = world.from_root(lambda: _located(source), "source")  # ranks may be in unlike folders
    with RunFolder(path) as folder:
        world.from_root(lambda: folder.lock() if _stays(source, folder, overrides) else None, "lock")
        found, run_path, warnings = choose(world, source)
        if world.rank == 0:
            for warning in warnings:
                print(f"warning: {warning}", file=sys.stderr, flush=True)
            _note_best(folder, found.round if found else 0) if warnings else None
        with found or nullcontext() as loaded:
            before = loaded.config if loaded else _read_config(world, folder)
            settings, changes = world.attempt(
                lambda: override_settings(before, overrides, _fixed(before)), "settings"
            )
            if loaded:
                _check_progress(world, loaded, settings, changes)
            world.stop_at = environment.stop_time(settings.run.walltime, end)
            target, resuming = world.from_root(lambda: _target(source, run_path, settings), "run folder")
            if resuming and not loaded and "rounds" in changes:
                world.from_root(lambda: _check_trained(folder, settings.rounds), "rounds")
            settings = config.build({**config.flatten(config.to_tree(settings)), "run.dir": str(target)})
            with folder if resuming else RunFolder(target) as target_folder:
                start = job.Start(
                    settings,
                    target_folder,
                    code,
                    dry,
                    loaded,
                    resuming=resuming,
                    changes=changes,
                    warnings=warnings,
                )
                return job.train(world, start)


def _note_best(folder: RunFolder, resumed: int) -> None:
    """Name best.h5 if it has more rounds than what is left beside damaged checkpoints."""
    best = folder.best_round() or 0
    if best > resumed:
        command = f"pfedmoe-mpi restart {folder.best} --run.dir NEW"
        print(f"note: best.h5 holds round {best}: {command} resumes there", file=sys.stderr, flush=True)


def _read_config(world: Comm, folder: RunFolder) -> dict[str, Any]:
    """Return the configuration of a run without a checkpoint, on all ranks."""
    return world.from_root(lambda: config.read_toml(folder.config), "configuration")


def _fixed(before: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the settings that a restart may not change."""
    settings = config.flatten(before)
    if not settings.get("privacy.clip"):
        return FIXED_IN_TRAINING
    by_sample = settings["privacy.unit"] == "sample"
    fixed = FIXED_IN_TRAINING + (FIXED_WITH_SAMPLES if by_sample else FIXED_WITH_CLIENTS)
    return fixed + FIXED_WITH_EPSILON if settings["privacy.epsilon"] else fixed


def _check_progress(
    world: Comm, loaded: Checkpoint, settings: Config, changes: Mapping[str, Sequence[Any]]
) -> None:
    """Refuse changes to rounds that are done or in progress; note how new `rounds` change a schedule.

    Raises:
        ConfigError: participation or masks change within a round, or fewer rounds are asked for than done.
    """
    if loaded.partial is not None and "participation" in changes:
        before = changes["participation"][0]
        raise ConfigError(
            f"round {loaded.round + 1} is in progress; its cohort was drawn with participation = {before}",
            "remove --participation until the round is done, or resume from an earlier checkpoint "
            "with --run.dir NEW",
        )
    masks = [name for name in ("privacy.masked", "privacy.neighbours") if name in changes]
    for name in masks if loaded.partial is not None else ():
        before = changes[name][0]
        raise ConfigError(
            f"round {loaded.round + 1} is in progress; its sum was begun with {name} = {str(before).lower()}",
            f"remove --{name} until the round is done, or resume from an earlier checkpoint "
            "with --run.dir NEW",
        )
    if "rounds" in changes and settings.rounds < loaded.round:
        raise ConfigError(
            f"rounds = {settings.rounds}, but {loaded.round} rounds are done; --rounds is the total",
            f"--rounds {loaded.round + settings.rounds} trains {settings.rounds} more",
        )
    schedule = settings.train.schedule
    if world.rank == 0 and "rounds" in changes and schedule in {"cosine", "linear"}:
        before, now = changes["rounds"]
        text = (
            f"the {schedule} schedule now ends at round {now} instead of {before}, so the learning rate jumps"
        )
        print(f"note: {text}", file=sys.stderr, flush=True)


def _check_trained(folder: RunFolder, rounds: int) -> None:
    """Refuse a total below the rounds that a run without a checkpoint had trained.

    Raises:
        ConfigError: fewer rounds are asked for.
    """
    try:
        trained = max(folder.rounds_after(0), default=0)
    except UnusableError:  # the file is kept, and the damage printed
        return
    if rounds < trained:
        raise ConfigError(
            f"rounds = {rounds}, but the run had trained {trained} rounds, which no checkpoint contains",
            f"--rounds {trained} trains them again; --run.dir NEW trains {rounds} in another folder",
        )


def _located(source: Path) -> tuple[Path, Path]:
    """Return the absolute source, and the run folder: the source itself, or that of this checkpoint.

    Links to folders are resolved, because one may be repointed during the run.

    Raises:
        CheckpointError: the source cannot be reached.
    """
    source = source.absolute()
    check_reachable(source, CheckpointError)
    if source.is_dir():
        return _resolved(source), _resolved(source)
    folder = _resolved(source.parent.parent)
    return folder / source.parent.name / source.name, folder


def _resolved(folder: str | Path) -> Path:
    return Path(os.path.realpath(folder))


def _stays(source: Path, folder: RunFolder, overrides: Mapping[str, Any]) -> bool:
    """Return whether the restart will write into the run folder of its source."""
    new = overrides.get("run.dir")
    return folder.resumable and source.exists() and (not new or _resolved(new) == folder.path)


def choose(world: Comm, source: Path) -> tuple[Checkpoint | None, Path | None, list[str]]:
    """Return (checkpoint, run folder, warnings), the same on all ranks.

    The checkpoint, open, is the newest good one of a run folder, or the file itself; None: start before
    round 1. The run folder is None for a file that is not the newest of its folder. The warnings are on
    damaged files. A run may write and remove checkpoints meanwhile.

    Raises:
        CheckpointError: on all ranks: the source is missing or not a run folder, or the file is damaged.
    """
    folder = RunFolder(source.absolute())
    is_folder, run_path = world.from_root(lambda: _kind_of(source, folder), "source")
    warnings: list[str] = []
    tried: set[Path] = set()
    while path := world.from_root(lambda: _next(source, folder, tried), "checkpoints"):
        tried.add(path)
        try:
            return checkpoint.open_everywhere(world, path), run_path, warnings
        except CheckpointError as error:
            if not is_folder:
                raise
            removed = not world.from_root(path.exists, "checkpoint")
            warnings += [] if removed else [error.problem]
    return None, run_path, warnings


def _next(source: Path, folder: RunFolder, tried: Collection[Path]) -> Path | None:
    """Return the newest checkpoint that was not tried yet, or the source itself if it is a file."""
    if source.is_dir():
        return checkpoint.newest(folder.checkpoints, tried)
    return None if tried else source.absolute()


def _kind_of(source: Path, folder: RunFolder) -> tuple[bool, Path | None]:
    """Return whether the source is a folder, and the run folder as of `choose`."""
    if not source.exists():
        raise CheckpointError(f"there is no run folder or checkpoint {source}", "check the path")
    if source.is_dir():
        if not folder.resumable:
            raise _not_a_run(folder)
        return True, folder.path
    source = source.absolute()
    run = RunFolder(source.parent.parent)
    file = _resolved(source.parent) / source.name
    is_newest = checkpoint.newest_first(run.checkpoints)[:1] == [file] and run.config.is_file()
    return False, run.path if is_newest else None


def _not_a_run(folder: RunFolder) -> CheckpointError:
    """Return the error about a folder without a run, which a start that ended early may have left."""
    if any(folder.path.iterdir()) and not holds_anything(folder.path):
        return CheckpointError(
            f"{folder.path} is not a run folder yet: its start did not reach config.toml or a checkpoint",
            "if it no longer runs, repeat the command that started it, which will use the folder",
        )
    problem = f"{folder.path} is not a run folder: it has neither checkpoints nor config.toml"
    return CheckpointError(problem, "check the path")


def _target(source: Path, run_path: Path | None, settings: Config) -> tuple[Path, bool]:
    """Return the folder to train in, and whether it is the run's existing one.

    Raises:
        CheckpointError: only the newest checkpoint may be resumed in the folder of its run.
        ConfigError: the folder exists and may not be renamed.
    """
    new = _resolved(settings.run.dir) if settings.run.dir else run_path
    if new is None or (run_path is None and new == source.absolute().parent.parent):
        raise CheckpointError(
            f"{source} is not the newest checkpoint of a run folder",
            "--run.dir NEW resumes from it in another folder",
        )
    if new != run_path:
        refuse_existing(new, settings.run.force)
    return new, new == run_path


def override_settings(
    before: Mapping[str, Any], overrides: Mapping[str, Any], fixed: Sequence[str], same_method: bool = True
) -> tuple[Config, dict[str, list[Any]]]:
    """Return an earlier configuration with overrides, and what they change: {name: [before, after]}.

    Settings of a single start (run.dir, run.force and others) come from the overrides alone.

    Args:
        fixed: sections and settings that may not change, in addition to those that define a federation.
        same_method: the algorithm and its section may not change. Else, with another algorithm, what belongs
            to the earlier one is left out: its section, and how its gate starts.

    Raises:
        ConfigError: an override changes a fixed setting.
    """
    defaults = {name: config.fields()[name].default for name in PER_START}
    earlier = {**config.flatten(before), **defaults}
    if overrides.get("run.code"):
        earlier = config.relocated(earlier, Path(overrides["run.code"]))
    old = config.build(earlier)
    then = config.flatten(config.to_tree(old))
    other = overrides.get("algorithm", old.algorithm)
    if not same_method and other != old.algorithm:
        kept = {n: v for n, v in then.items() if n.partition(".")[0] != old.method and n != "gate.start"}
        then = {**config.flatten(config.to_tree(config.build({"algorithm": other}))), **kept}
    new = config.build({**then, **overrides})
    now = config.flatten(config.to_tree(new))
    names = [name for name in {**then, **now} if name not in PER_START and then.get(name) != now.get(name)]
    fixed = ("clients", "seed", "model", *(("algorithm", old.method) if same_method else ()), *fixed)
    refused = [
        f"{name}: {then.get(name)} → {now.get(name)}"
        for name in names
        if name in fixed or (name.partition(".")[0] in fixed and name not in MOVABLE)
    ]
    if refused:
        problem = "these settings cannot be changed now: " + "; ".join(refused)
        raise ConfigError(problem, "remove these flags, or start a new run with them")
    return new, {name: [then.get(name), now.get(name)] for name in names}
