"""Branching a run: the same federation from one of its rounds, under settings that a restart refuses.

Every draw comes from its address (seed, purpose, round, client), so a run and its fork share every random
number: the same cohorts, batches and augmentations. What differs between them, client by client, is the
effect of the changed settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfedmoe_mpi import checkpoint, config, environment
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.errors import CheckpointError, ConfigError
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.mpi.session import under_mpi
from pfedmoe_mpi.names import check_reachable
from pfedmoe_mpi.run import job
from pfedmoe_mpi.run.folder import RunFolder
from pfedmoe_mpi.run.restart import override_settings

# What makes a run and its fork comparable: the same clients, rows, models and draws.
SHARED = ("partition", "unseen", "join", "stream", "data.mean", "data.std")


def fork(source: Path, at: int, overrides: Mapping[str, Any], dry: bool) -> int:
    """Train a branch of a run from round `at`, with changed settings; return the exit code.

    With `dry` only print its plan.
    """
    end = environment.slurm_end() if environment.launched_rank() == 0 else None
    given = {"command": "fork", "--at": at, "--dry": dry, **overrides}
    singleton = str(overrides.get("run.singleton", "")).lower() == "true"
    return under_mpi(
        lambda world, code: _fork(world, source, at, overrides, code, end, dry), given, singleton
    )


def _fork(
    world: Comm,
    source: Path,
    at: int,
    overrides: Mapping[str, Any],
    code: str,
    end: float | None,
    dry: bool,
) -> int:
    """Fork a run; collective. `code`, `end` and `dry`: as for `job.begin`."""
    path = world.from_root(lambda: _checkpoint_of(RunFolder(source.absolute()), at), "checkpoint")
    with checkpoint.open_everywhere(world, path) as loaded:
        settings, changes = world.attempt(lambda: _settings(loaded, overrides), "settings")
        target = world.from_root(lambda: job.new_folder(settings), "run folder")
        world.stop_at = environment.stop_time(settings.run.walltime, end)
        with RunFolder(target) as folder:
            fork_facts = {"run": str(path.parent.parent), "round": at, "settings": changes}
            start = job.Start(settings, folder, code, dry, loaded, changes=changes, fork=fork_facts)
            return job.train(world, start)


def _settings(loaded: Checkpoint, overrides: Mapping[str, Any]) -> tuple[config.Config, dict[str, list[Any]]]:
    """Return the settings of the fork, and what differs from the run's: {name: [before, after]}.

    Raises:
        ConfigError: nothing would differ after the round, or what may not.
    """
    settings, changes = override_settings(loaded.config, overrides, SHARED, same_method=False)
    if not changes:
        problem = "no setting differs from the run's, so its fork would be the same run"
        raise ConfigError(problem, "add the settings that should differ, such as --gate.weights equal")
    if settings.rounds <= loaded.round:
        problem = f"rounds = {settings.rounds}, but the fork begins after round {loaded.round}"
        raise ConfigError(problem, f"--rounds {2 * loaded.round} trains {loaded.round} rounds")
    marked = {**config.flatten(config.to_tree(settings)), "run.forked": loaded.round}
    return config.build(marked), changes


def _checkpoint_of(folder: RunFolder, at: int) -> Path:
    """Return the run's checkpoint of `at` complete rounds.

    Raises:
        CheckpointError: there is none; the message lists those that there are.
    """
    check_reachable(folder.path, CheckpointError)
    if not folder.resumable:
        raise CheckpointError(f"{folder.path} is not a run folder", "name the folder of a run")
    path = folder.checkpoints / checkpoint.name(at, partial=False)
    points = checkpoint.restart_points(folder.checkpoints)
    if path in points:
        return path
    best = folder.best_round()
    if best == at:
        return folder.best
    names = [each.stem for each in points]
    rounds = {int(name.split("-")[1]) for name in names if "partial" not in name}
    rounds |= {best} if best is not None else set()
    problem = f"{folder.path} has no checkpoint of round {at}"
    if not at:
        raise CheckpointError(problem, "train a new run with these settings, which is a fork at round 0")
    again = f"train the run again with --run.checkpoint_every {at} --run.keep 99"
    if not rounds:
        raise CheckpointError(f"{problem}, nor of any other", again)
    listed = ", ".join(map(str, sorted(rounds)))
    raise CheckpointError(f"{problem}; it has these rounds: {listed}", f"fork at one of them, or {again}")
