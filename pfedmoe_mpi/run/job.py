"""A training job from its start to its exit code. `restart.py` prepares a job that resumes a run."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfedmoe_mpi import checkpoint, config, environment
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, DivergedError, RunError
from pfedmoe_mpi.log import LOGGER
from pfedmoe_mpi.mpi.comm import TIMEOUT, Comm
from pfedmoe_mpi.mpi.session import under_mpi
from pfedmoe_mpi.names import check_path
from pfedmoe_mpi.run import console, curves
from pfedmoe_mpi.run.folder import RunFolder
from pfedmoe_mpi.run.place import default, refuse_existing
from pfedmoe_mpi.run.reporter import Reporter

if TYPE_CHECKING:  # these import torch, which is imported only after the arguments were checked
    from pfedmoe_mpi.federation.federation import Federation
    from pfedmoe_mpi.federation.loop import Loop

STOPS_WITHOUT_PROGRESS = 2  # in a row; then the run ends, because the job scripts would resubmit it for ever
MOST_COUNTS = 100_000  # clients × classes, in one line of events.jsonl


@dataclass(frozen=True)
class Start:
    """How a job begins: a new run, or one resumed from a checkpoint."""

    settings: Config
    folder: RunFolder
    code: str  # this program's version, on rank 0
    dry: bool = False  # print the plan and stop
    loaded: Checkpoint | None = None  # None: from round 1
    resuming: bool = False  # continue in an existing run folder
    changes: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # {setting: (before, after)}
    warnings: Sequence[str] = ()
    fork: Mapping[str, Any] = field(default_factory=dict)  # the run and the round that this one branches off

    @property
    def history(self) -> Sequence[Mapping[str, Any]]:
        """The metrics rows of the rounds that are done."""
        return self.loaded.history if self.loaded else []


def run(settings: Config, dry: bool) -> int:
    """Start MPI and train a new run; return the exit code."""
    end = environment.slurm_end() if environment.launched_rank() == 0 else None
    given = {"command": "run", "--dry": dry, **config.flatten(config.to_tree(settings))}
    return under_mpi(
        lambda world, code: begin(world, settings, code, end, dry), given, settings.run.singleton
    )


def begin(world: Comm, settings: Config, code: str, end: float | None, dry: bool = False) -> int:
    """Train a new run; collective. Return the exit code.

    Args:
        code: the program's version.
        end: when Slurm ends the job, on rank 0.
        dry: print the plan only; nothing is written.
    """
    path = world.from_root(lambda: new_folder(settings), "run folder")
    world.stop_at = environment.stop_time(settings.run.walltime, end)
    with RunFolder(path) as folder:
        return train(world, Start(settings, folder, code, dry))


def new_folder(settings: Config) -> Path:
    """Return the path of the new run's folder, which is not created yet; raise ConfigError if it is taken."""
    path = Path(settings.run.dir or "runs").absolute()
    check_path("the run folder", str(path), ConfigError)  # the current folder's path is part of it
    if not settings.run.dir:
        return default(settings.method)
    refuse_existing(path, settings.run.force)
    return path


def train(world: Comm, start: Start) -> int:
    """Build the federation, print the plan and train; collective. Return the exit code.

    Raises:
        UserError: on all ranks, before anything is written: a setting, the data or the checkpoint is wrong.
        RunError: on all ranks: the run cannot continue.
    """
    from pfedmoe_mpi.federation import disk
    from pfedmoe_mpi.federation.build import build
    from pfedmoe_mpi.federation.loop import is_finished
    from pfedmoe_mpi.run.identity import check_same_federation

    world.timeout = start.settings.run.timeout or TIMEOUT
    world.from_root(lambda: curves.check(start.settings), "packages")
    federation = build(world, start.settings, loaded=start.loaded)
    world.from_root(lambda: _check_patience(federation), "patience")
    if start.loaded:
        check_same_federation(world, federation, start.loaded, forked=bool(start.fork))
    else:
        world.from_root(federation.method.check, "the method's files")
    device_lines = world.gather(f"{federation.device.line}, {len(federation.clients)} client(s)", "hosts")
    ranks = world.gather(disk.scratch_of(federation, platform.node()), "scratch folders")
    if world.rank == 0:
        done = disk.NEW
        if start.loaded:
            done = disk.Done.of(start.loaded, len(federation.task.training), start.resuming)
        lines = console.plan(federation, device_lines, ranks, start.folder.path, done)
        print("\n".join([*console.changed(start.changes), *lines]), flush=True)
    if start.dry:
        return EXIT_DONE
    if start.loaded and is_finished(federation.config, start.history):
        return _already_finished(world, start, start.loaded, federation.config)
    return _train_rounds(world, start, federation, device_lines)


def _check_patience(federation: Federation) -> None:
    """Refuse `run.patience` without the measurements that it waits for.

    Raises:
        ConfigError: there are no validation rows, or they are measured less often.
    """
    patience, every = federation.config.run.patience, federation.config.eval.every
    trained = set(range(federation.task.clients)) - set(federation.task.unseen)
    if patience and not any(len(federation.partition.validation[client]) for client in trained):
        raise ConfigError(
            f"run.patience = {patience} waits for a better accuracy on validation rows, and there are none",
            "add --partition.validation 0.2, or remove --run.patience",
        )
    if patience and federation.config.eval.clients:
        drawn = f"eval.clients = {federation.config.eval.clients:g} measures other clients in every round"
        problem = f"run.patience = {patience} compares rounds, and {drawn}"
        raise ConfigError(problem, "remove --eval.clients or --run.patience")
    if 0 < patience < every:
        raise ConfigError(
            f"run.patience = {patience} is less than the rounds between measurements, eval.every = {every}",
            f"--run.patience {2 * every}",
        )


def _already_finished(world: Comm, start: Start, loaded: Checkpoint, settings: Config) -> int:
    """Complete the run folder of a finished run and print how to train further; return the exit code.

    Raises:
        ConfigError: on all ranks: settings changed, or another folder was named, and no round would use it.
    """
    early, rounds = console.early_end(settings, loaded.history), settings.rounds
    state = early or f"{loaded.round} of {rounds} rounds are done"
    if start.changes or not start.resuming:
        given = ", ".join(start.changes) or "--run.dir"
        problem = f"the run is finished: {state}, so {given} has no effect"
        more = f"add --rounds {2 * loaded.round} to train as many again"
        raise ConfigError(problem, "add --run.patience 0 to train the other rounds" if early else more)
    world.timeout = settings.run.timeout or math.inf  # rank 0 may have to copy all clients' vectors
    done = (loaded.history, settings.run.keep, loaded.path)
    world.from_root(lambda: start.folder.complete(*done), "run folder")
    if world.rank == 0:
        more = (
            "--run.patience 0 trains the others"
            if early
            else f"--rounds {2 * loaded.round} trains as many again"
        )
        print(f"the run is finished: {state}; {more}")
    return EXIT_DONE


def _train_rounds(world: Comm, start: Start, federation: Federation, device_lines: Sequence[str]) -> int:
    """Open the run folder, train the rounds that are left, and report how the run ended."""
    from pfedmoe_mpi.checkpoint import frozen
    from pfedmoe_mpi.federation.loop import Loop
    from pfedmoe_mpi.run.identity import run_identity

    settings, folder = federation.config, start.folder
    report_facts = world.from_root(lambda: _report_facts(federation), "what reports need")
    toml = config.to_toml(settings)
    if start.resuming:
        world.from_root(folder.make_subfolders, "run folder")
    else:
        first = "" if start.loaded else toml
        numbered = not settings.run.dir
        folder.path = world.from_root(
            lambda: folder.create(settings.run.force, first, numbered), "run folder"
        )
    hosts = world.gather(platform.node(), "hosts")
    world.attempt(lambda: folder.log_to_file(hosts, world.rank), "logs")
    if world.rank == 0 and "uncounted" in report_facts:
        LOGGER.warning("the operations of a client step were not counted: %s", report_facts["uncounted"])
    world.from_root(lambda: frozen.write(folder.path, federation.frozen), "frozen tensors")
    identity = {"code": start.code, **run_identity(federation)}
    reporter = _reporter(world, start, federation)
    loop = Loop(world, federation, reporter, folder.checkpoints)
    loop.saver.identity = identity
    try:
        if start.loaded:
            (loop.fork if start.fork else loop.resume)(start.loaded)
            if start.changes or not start.resuming:
                _save_again(loop, start.loaded)
            if not start.resuming and not loop.saver.written:
                raise RunError(
                    "the run ends because its first checkpoint cannot be written, and without one it depends "
                    f"on {start.loaded.path}",
                    "fix the error above, and run the command again with --run.force true",
                )
        world.from_root(lambda: folder.describe(config.to_toml(settings), start.history), "run folder")
        world.from_root(lambda: folder.keep_code(federation.code), "run folder")
        facts = {**identity, "changes": start.changes, "warnings": list(start.warnings), **report_facts}
        facts |= {"fork": start.fork} if start.fork else {}
        _report_start(world, reporter, start, device_lines, facts)
        if start.loaded:
            start.loaded.close()  # what is still needed of its files stays open, and the rest takes no space
        finished = loop.run()
    except RunError as error:
        diverged = isinstance(error, DivergedError)
        reporter.event("error", round=loop.round, error=error.problem, diverged=diverged)
        raise
    finally:
        reporter.close()
    if not finished:
        return _report_stop(world, reporter, loop)
    world.timeout = settings.run.timeout or math.inf  # rank 0 may have to copy all clients' vectors
    world.from_root(reporter.complete_best, "best.h5")
    _report_finish(world, reporter, federation, loop)
    return EXIT_DONE


def _reporter(world: Comm, start: Start, federation: Federation) -> Reporter:
    """Return the reporter of this rank; only rank 0 shows progress."""
    settings = federation.config
    if world.rank:
        return Reporter(start.folder, settings.run.keep, settings.run.forked, None)
    progress = console.Progress(settings.rounds, len(start.history), len(federation.clients))
    run_curves = curves.Curves(start.folder.path, start.history) if settings.run.tensorboard else None
    return Reporter(start.folder, settings.run.keep, settings.run.forked, progress, run_curves)


def _report_facts(federation: Federation) -> dict[str, Any]:
    """Return what reports need: digests of data and partition, how many numbers are trained and frozen if
    any are, the classes' names, and by client the training samples by class, operations (or why they were
    not counted) and names.

    What is by client is left out if there are too many numbers for a figure.
    """
    from pfedmoe_mpi.federation import operations
    from pfedmoe_mpi.federation.federation import named_classes

    counts, names = federation.task.counts, federation.partition.client_names
    facts: dict[str, Any] = {
        "data_digest": federation.data_digest,
        "partition_digest": federation.partition.digest(),
    }
    frozen = {kind: layout.size for kind, layout in federation.frozen.layouts.items()}
    if frozen:
        largest = max(layout.size for layout in federation.client_layouts)
        facts["numbers"] = {"server": federation.state_layout.size, "client": largest, "frozen": frozen}
    classes = named_classes(federation)
    if classes:
        facts["class_names"] = list(classes)
    if counts.size > MOST_COUNTS:
        return facts
    facts["class_counts"] = counts.tolist()
    try:
        facts["operations"] = operations.record(federation)
    except (Exception, SystemExit) as error:  # of code of the user's own, which need not train on zeros
        facts["uncounted"] = repr(error)
    return {**facts, "client_names": list(names)} if names else facts


def _save_again(loop: Loop, loaded: Checkpoint) -> None:
    """Write the loaded state as a checkpoint of this run: a kill before the next one then loses nothing."""
    if loaded.partial is None:
        loop.save()
    else:
        rounds_done = (loaded.round, loaded.state, loaded.history)
        loop.saver.partial(*rounds_done, loaded.partial, loaded.finished)


def _report_start(
    world: Comm,
    reporter: Reporter,
    start: Start,
    device_lines: Sequence[str],
    facts: Mapping[str, Any],
) -> None:
    """Write the event of this start and print the run folder, both with the path of a source elsewhere."""
    loaded = start.loaded
    source: dict[str, Any] = {"checkpoint": loaded.path.name, "round": loaded.round} if loaded else {}
    source |= {"source": str(loaded.path)} if loaded and not start.resuming else {}
    process = {"host": platform.node(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
    kind = "restart" if loaded else "start"
    reporter.event(kind, ranks=world.size, hosts=list(device_lines), **process, **source, **facts)
    if world.rank == 0:
        named = source.get("source", source.get("checkpoint"))
        resumed = f", resumes after round {loaded.round} from {named}" if loaded else ""
        print(f"run folder {reporter.folder.path}{resumed}", flush=True)


def _report_finish(world: Comm, reporter: Reporter, federation: Federation, loop: Loop) -> None:
    """Write the event of the end; print the table of clients, the best round and how to draw a report."""
    folder = reporter.folder
    reporter.event("finish", round=loop.round)
    if world.rank == 0:
        best, chosen_on = folder.best_round(), console.selecting_rows(loop.history)
        held = f"best.h5 holds round {best}, the best on {chosen_on} with a checkpoint; " if best else ""
        lines = [
            console.table(federation, loop.history),
            console.early_end(federation.config, loop.history),
            f"{held}`report {folder.path}` draws the run",
        ]
        text = "\n".join(filter(None, lines))
        LOGGER.info("\n%s", text)
        print(text, flush=True)


def _report_stop(world: Comm, reporter: Reporter, loop: Loop) -> int:
    """Report a stop; return the exit code.

    Raises:
        RunError: on all ranks: the run was stopped again before any client step was done.
    """
    folder = reporter.folder
    reporter.event("stop", round=loop.round, steps=loop.steps, by=world.stopped_by)
    stops = world.from_root(folder.stops_without_progress, "stops without progress")
    if stops >= STOPS_WITHOUT_PROGRESS:
        raise RunError(
            f"stopped {stops} times in a row before any client step was done; another start would not help",
            "give the job more time, more ranks, or fewer --train.epochs; "
            f"then `restart {folder.path}` resumes the run",
        )
    if world.rank == 0:
        done = f"{loop.steps} client steps done" if loop.steps else "no client's step was done"
        saved = checkpoint.newest_first(folder.checkpoints)
        where = f"after round {loop.round} with a checkpoint" if saved else "before round 1"
        print(
            f"stopped by {world.stopped_by or 'another rank'} {where} "
            f"({done} since the start); resume with: restart {folder.path}",
            flush=True,
        )
    return EXIT_STOPPED
