"""A training job from start to exit code: new, or taken up from a checkpoint."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from pfedmoe_mpi import checkpoint, comm, config, console, launch, live
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.comm import Comm
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.errors import EXIT_DONE, EXIT_STOPPED, CheckpointError, ConfigError, RunError
from pfedmoe_mpi.launch import LOGGER, under_mpi
from pfedmoe_mpi.reporter import Reporter
from pfedmoe_mpi.runfolder import RunFolder, default

# A restart repeats bits only if these stay as they were.
BITS = ("torch", "device", "threads", "precision")
LEGS_WITHOUT_PROGRESS = 2  # in a row, then the run ends: the job scripts would submit it for ever
MOST_COUNTS = 100_000  # clients × classes in one line of events.jsonl
# Settings that make it another federation, beside those that an evaluation needs too.
WHO_AND_WHEN = ("partition", "gate", "unseen", "join", "stream", "data.mean", "data.std")
# Asked for anew at every start.
ANEW = ("run.dir", "run.force", "run.singleton")


def run(settings: Config, dry: bool) -> int:
    """A new run."""
    end = launch.slurm_end() if launch.launched_rank() == 0 else None
    return under_mpi(lambda world, code: begin(world, settings, code, end, dry), settings.run.singleton)


def begin(world: Comm, settings: Config, code: str, end: float | None, dry: bool = False) -> int:
    """Play a new run; collective. `code`: this program's version; `end`: when Slurm ends the job (rank 0)."""
    path = world.from_root(lambda: _new_folder(settings), "run folder")
    world.stop_at = launch.stop_at(settings.run.walltime, end)
    with RunFolder(path) as folder:
        return _train(world, settings, folder, None, code, dry=dry)


def _new_folder(settings: Config) -> Path:
    path = Path(settings.run.dir).absolute() if settings.run.dir else default(settings.algorithm)
    RunFolder.refuse_existing(path, settings.run.force)
    return path


def restart(source: Path, overrides: Mapping[str, Any]) -> int:
    """Go on from a run folder's newest good checkpoint, or from one file."""
    end = launch.slurm_end() if launch.launched_rank() == 0 else None
    singleton = str(overrides.get("run.singleton", "")).lower() == "true"
    return under_mpi(lambda world, code: resume(world, source, overrides, code, end), singleton)


def resume(world: Comm, source: Path, overrides: Mapping[str, Any], code: str, end: float | None) -> int:
    """Play on; collective. Arguments as of `begin`."""
    with _run_of(source) as held:
        world.from_root(lambda: held.lock() if _stays(source, held, overrides) else None, "lock")
        path, own, warnings = choose(world, source)
        if world.rank == 0:
            for warning in warnings:
                print(f"warning: {warning}", file=sys.stderr, flush=True)
        with checkpoint.opened(world, path) if path else nullcontext() as loaded:
            toml = held.config
            before = (
                loaded.config if loaded else world.from_root(lambda: config.read_toml(toml), "configuration")
            )
            settings, changes = continued(before, overrides, WHO_AND_WHEN)
            if loaded:
                _weigh(world, loaded, settings, changes)
            world.stop_at = launch.stop_at(settings.run.walltime, end)
            to, again = world.from_root(lambda: _goes_on_in(source, own, settings), "run folder")
            settings = config.build({**config.flatten(config.to_tree(settings)), "run.dir": str(to)})
            with held if again else RunFolder(to) as folder:
                told = partial(_train, again=again, changes=changes, warnings=warnings)
                return told(world, settings, folder, loaded, code)


def _weigh(world: Comm, loaded: Checkpoint, settings: Config, changes: Mapping[str, Sequence[Any]]) -> None:
    """Refuse what was done otherwise already; say what a schedule makes of other rounds."""
    if loaded.partial is not None and "participation" in changes:
        problem = f"round {loaded.round + 1} is in progress, and its cohort drawn by participation"
        raise ConfigError(
            f"{problem} {changes['participation'][0]}",
            "leave --participation out until the round is done, or go on from an earlier "
            "checkpoint with --run.dir NEW",
        )
    if "rounds" in changes and settings.rounds < loaded.round:
        raise ConfigError(
            f"{loaded.round} rounds are done, and --rounds is how many there will be in total",
            f"--rounds {loaded.round + settings.rounds} plays {settings.rounds} more",
        )
    schedule = settings.train.schedule
    if world.rank == 0 and "rounds" in changes and schedule != "constant":
        then, now = changes["rounds"]
        said = f"the {schedule} learning rate ends at round {now}, no more at {then}, and jumps here"
        print(f"note: {said}", file=sys.stderr, flush=True)


def _run_of(source: Path) -> RunFolder:
    """The folder that a source is, or lies in as a checkpoint."""
    source = source.absolute()
    return RunFolder(source if source.is_dir() else source.parent.parent)


def _stays(source: Path, held: RunFolder, overrides: Mapping[str, Any]) -> bool:
    """Whether the restart will write into the run folder that its source belongs to."""
    new = overrides.get("run.dir")
    is_run = held.config.is_file() or held.checkpoints.is_dir()
    return is_run and source.exists() and (not new or Path(new).absolute() == held.path)


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
        ConfigError: an override that would make it another federation; `fixed` are more sections or settings
            that do.
    """
    anew = {name: config.fields()[name].default for name in ANEW}
    old = config.build({**config.flatten(before), **anew})
    new = config.build({**config.flatten(config.to_tree(old)), **overrides})
    then, now = (config.flatten(config.to_tree(settings)) for settings in (old, new))
    names = [name for name in {**then, **now} if name not in ANEW and then.get(name) != now.get(name)]
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


def _train(
    world: Comm,
    settings: Config,
    folder: RunFolder,
    loaded: Checkpoint | None,
    code: str,
    *,
    dry: bool = False,
    again: bool = False,
    changes: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
) -> int:
    """Build, tell, train. `again`: the folder exists and goes on."""
    from pfedmoe_mpi import setup

    world.timeout = settings.run.timeout or world.timeout
    world.from_root(lambda: live.check(settings), "packages")
    federation = setup.build(world, settings)
    settings = federation.config
    _compare(world, federation, loaded)
    if not loaded:
        world.from_root(federation.method.check, "the method's files")
    lines = world.gather(f"{federation.device.line}, {len(federation.clients)} clients", "hosts")
    if world.rank == 0:
        print("\n".join(console.plan(federation, lines)), flush=True)
    if dry:
        return EXIT_DONE
    if loaded and loaded.round >= settings.rounds:
        if again and not changes:
            world.from_root(lambda: folder.complete(loaded.history), "run folder")
        if world.rank == 0:
            more = f"--rounds {2 * loaded.round} plays as many again"
            print(f"the run is finished: {loaded.round} of {settings.rounds} rounds are done; {more}")
        return EXIT_DONE
    known = world.from_root(lambda: _for_reports(federation), "what reports need")
    facts = {"changes": changes or {}, "warnings": list(warnings), **known}
    return _play(world, federation, folder, loaded, code, again, lines, facts)


def _play(
    world: Comm,
    federation: Any,
    folder: RunFolder,
    loaded: Checkpoint | None,
    code: str,
    again: bool,
    lines: Sequence[str],
    facts: Mapping[str, Any],
) -> int:
    """Open the run folder, train, say how it ended. `facts` are for events.jsonl."""
    from pfedmoe_mpi import federation as loop_room

    settings = federation.config
    history = loaded.history if loaded else []
    if not again:
        world.from_root(lambda: folder.create(settings.run.force), "run folder")
    world.agree(lambda: folder.log_to_file(world.rank), "logs")
    identity = {"code": code, **_identity(federation)}
    own = len(federation.clients)
    progress = console.Progress(settings.rounds, len(history), own) if world.rank == 0 else None
    curves = live.Curves(folder.path, history) if progress and settings.run.tensorboard else None
    reporter = Reporter(folder, settings.run.keep, progress, curves)
    loop = loop_room.Loop(world, federation, reporter, folder.checkpoints)
    loop.saver.identity = identity
    try:
        if loaded:
            loop.resume(loaded)
            if facts["changes"] or not again:
                _write_anew(loop, loaded)
        world.from_root(lambda: folder.describe(config.to_toml(settings), history), "run folder")
        _started(world, reporter, loaded, lines, {**identity, **facts})
        finished = loop.run()
    except RunError as error:
        reporter.event("error", round=loop.round, error=error.problem)
        raise
    finally:
        for shown in (progress, curves):
            if shown:
                shown.close()
    _ended(world, reporter, federation, loop, finished)
    return EXIT_DONE if finished else EXIT_STOPPED


def _compare(world: Comm, federation: Any, loaded: Checkpoint | None) -> None:
    """Refuse data, a partition or models other than the checkpoint's; say what makes bits differ."""
    if loaded is None:
        return
    from pfedmoe_mpi.roundsum import RoundSum

    for name, own in (("data", federation.data_digest), ("partition", federation.partition.digest())):
        then = loaded.identity[f"{name}_digest"]
        if own != then:
            raise CheckpointError(
                f"the {name} changed since the checkpoint: digest {then[:16]}… then, {own[:16]}… now",
                "restart with the same data, or start a new run",
            )
    lengths = {name: place.stop - place.start for name, place in federation.state_layout.parts.items()}
    cohort, payload = federation.method.cohort(loaded.round + 1), federation.method.payload(lengths)
    total = RoundSum(federation.task, cohort, payload)
    loaded.check_fits(federation.state_layout, federation.client_layouts, len(total.buffer))
    now = _identity(federation)
    before = {name: loaded.identity.get(name, "unknown") for name in BITS}
    differing = [f"{name} {before[name]} → {now[name]}" for name in BITS if before[name] != now[name]]
    if differing and world.rank == 0:
        listed = "; ".join(differing)
        print(f"note: bits will differ from an uninterrupted run: {listed}", file=sys.stderr, flush=True)


def _identity(federation: Any) -> dict[str, str]:
    """What a run's bits depend on beside its configuration, for the checkpoint and for events.jsonl."""
    import h5py
    import numpy
    import torch

    from pfedmoe_mpi import clientmodel

    return {
        "samples": clientmodel.described(federation),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "h5py": h5py.__version__,
        "mpi": comm.library(),
        "device": federation.device.model,
        "threads": str(federation.config.train.threads),
        "precision": federation.config.train.precision,
    }


def _for_reports(federation: Any) -> dict[str, Any]:
    """Training samples by client and class, operations by client, the names that the data give their clients;
    nothing if too many for a figure.
    """
    from pfedmoe_mpi import setup

    counts = federation.task.counts
    if counts.size > MOST_COUNTS:
        return {}
    costs = setup.sample_costs(federation.task, federation.method)
    named = {"client_names": list(federation.dataset.client_names)} if federation.dataset.client_names else {}
    return {"class_counts": counts.tolist(), "multiply_adds": costs, **named}


def _write_anew(loop: Any, loaded: Checkpoint) -> None:
    """What was taken up as a checkpoint of this run: killed before the next one, it goes on from here."""
    if loaded.partial is None:
        loop.save()
    else:
        whole = (loaded.round, loaded.state, loaded.history)
        loop.saver.partial(*whole, loaded.partial, loaded.finished)


def _started(
    world: Comm,
    reporter: Reporter,
    loaded: Checkpoint | None,
    lines: Sequence[str],
    facts: Mapping[str, Any],
) -> None:
    source = {"checkpoint": loaded.path.name, "round": loaded.round} if loaded else {}
    where = {"host": platform.node(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
    kind = "restart" if loaded else "start"
    reporter.event(kind, ranks=world.size, hosts=list(lines), **where, **source, **facts)
    if world.rank == 0:
        print(f"run folder {reporter.folder.path}", flush=True)


def _ended(world: Comm, reporter: Reporter, federation: Any, loop: Any, finished: bool) -> None:
    """The last event and the last words.

    Raises:
        RunError: on all ranks: stopped again before any client's step was done.
    """
    folder = reporter.folder
    if finished:
        reporter.event("finish", round=loop.round)
        if world.rank == 0:
            held = folder.best_round()
            kept = f"best.h5 holds round {held}; " if held else ""
            text = f"{console.table(federation, loop.history)}\n{kept}`report {folder.path}` draws the run"
            LOGGER.info("\n%s", text)
            print(text, flush=True)
        return
    reporter.event("stop", round=loop.round, steps=loop.steps, by=world.stopped_by)
    idle = world.from_root(folder.stops_without_progress, "legs without progress")
    if idle >= LEGS_WITHOUT_PROGRESS:
        raise RunError(
            f"stopped {idle} times in a row before any client's step was done, so further legs are of no use",
            "give the job more time, more ranks, or fewer --train.epochs; "
            f"then `restart {folder.path}` goes on",
        )
    if world.rank == 0:
        done = f"{loop.steps} client steps done" if loop.steps else "no client's step was done"
        saved = checkpoint.newest_first(folder.checkpoints)
        where = f"after round {loop.round} with a checkpoint" if saved else "before round 1"
        print(
            f"stopped by {world.stopped_by or 'another rank'} {where} "
            f"({done} since the start); go on with: restart {folder.path}",
            flush=True,
        )
