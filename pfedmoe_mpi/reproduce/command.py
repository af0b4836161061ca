"""The command `reproduce`: train the runs of a table one after the other, each in its own run folder.

All runs share one MPI session. A run depends on its configuration alone, whatever the process did before, so
no launcher has to start between two runs, there is one process to signal, and `mpirun -n K` means the same
as for a single run. A fault ends the whole job. The same command then skips finished runs and resumes the
others from their checkpoints.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfedmoe_mpi import checkpoint, config, environment
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, ConfigError, RunError, StoppedError
from pfedmoe_mpi.models.names import resolve_name
from pfedmoe_mpi.mpi import session
from pfedmoe_mpi.mpi.comm import TIMEOUT, Comm
from pfedmoe_mpi.reproduce import grid
from pfedmoe_mpi.reproduce.grid import Table, TableRun
from pfedmoe_mpi.run import job, restart
from pfedmoe_mpi.run.folder import RunFolder

if TYPE_CHECKING:
    from pfedmoe_mpi.federation.disk import DiskUse

# Settings that may differ from those of a run's earlier start: paths and speed.
CHANGEABLE = tuple(name for name in grid.HARMLESS if name != "rounds")
AUTO = {
    "model.pool": ["auto"],
    "model.shared": "auto",
    "model.dim": 0,
}  # a run folder has the resolved values


@dataclass(frozen=True)
class ReproduceFlags:
    """Flags of the command that are not settings of the runs."""

    out: str = ""
    scale: float = 1.0
    only: str = ""
    task: str = ""
    dry: bool = False


def run(path: Path, settings: Mapping[str, Any], flags: ReproduceFlags) -> int:
    """Print the estimated cost of a table's runs, then train them.

    Raises:
        UserError: the table or a setting is invalid; nothing was written.
    """
    table = grid.read(path)
    runs = grid.expand(table, settings, flags.scale, flags.only, flags.task)
    end = environment.slurm_end() if environment.launched_rank() == 0 else None

    def work(world: Comm, code: str) -> int:
        out = world.from_root(lambda: Path(flags.out or f"runs/{table.name}").absolute(), "folder")
        world.stop_at = environment.stop_time(runs[0].config.run.walltime, end)
        rounds = world.from_root(
            lambda: {run.name: _rounds_left(out / run.name, run) for run in runs}, "runs"
        )
        unfinished = [run for run in runs if rounds[run.name]]
        _print(world, _heading(table, runs, unfinished, out))
        try:
            _print(world, _plan(world, unfinished, rounds, out))
        except StoppedError:  # raised on all ranks; nothing is lost
            _print(world, ["stopped before the first run; run the same command again to resume"])
            return EXIT_STOPPED
        if flags.dry:
            return EXIT_DONE
        changes = {name: value for name, value in settings.items() if name.startswith(grid.HARMLESS)}

        def train(run: TableRun) -> int:
            return _train_run(world, run, out / run.name, changes, code, end)

        return _train_all(world, unfinished, out, train)

    content = {f"table.{name}": value for name, value in vars(table).items() if name != "path"}
    given = {"command": "reproduce", **vars(flags), **content, **settings}
    return session.under_mpi(work, given, runs[0].config.run.singleton)


def _print(world: Comm, lines: Sequence[str]) -> None:
    """Print lines, on rank 0 only."""
    if world.rank == 0 and lines:
        print("\n".join(lines), flush=True)


def _rounds_left(folder: Path, run: TableRun) -> int:
    """Return the rounds that a run has left according to its folder: 0 if it is finished, else at least 1.

    Raises:
        ConfigError: the folder contains a run with other settings.
    """
    run_folder = RunFolder(folder)
    if not run_folder.config.is_file():
        return run.config.rounds
    earlier = config.read_toml(run_folder.config)
    differences = _differences(earlier, run.config)
    if differences:
        differences = _differences(earlier, _apply_proposals(run.config))
    if differences:
        problem = f"{folder} contains a run with other settings: {'; '.join(differences)}"
        raise ConfigError(problem, "name another folder with --out, or repeat the flags of the first start")
    if run_folder.finished:
        return 0
    newest = checkpoint.newest_first(run_folder.checkpoints)[:1]
    done = max((int(path.stem.split("-")[1]) - ("partial" in path.stem) for path in newest), default=0)
    return max(1, run.config.rounds - done)


def _differences(earlier: Mapping[str, Any], settings: Config) -> list[str]:
    """Return `name old → new` for every setting that may not differ from the run's earlier start."""
    return [
        f"{name} {earlier[name]} → {value}"
        for name, value in config.flatten(config.to_tree(settings)).items()
        if name in earlier
        and earlier[name] != _resolved(name, value)
        and value != AUTO.get(name)
        and not name.startswith(CHANGEABLE)
    ]


def _resolved(name: str, value: Any) -> Any:
    """Return a setting as a run folder has it: architectures by their full names."""
    if name not in {"model.pool", "model.shared"} or value == AUTO[name]:
        return value
    return resolve_name(value) if isinstance(value, str) else [resolve_name(each) for each in value]


def _apply_proposals(settings: Config) -> Config:
    """Return the settings completed with what the split and the data source propose."""
    from pfedmoe_mpi.data.sources.open import open_dataset
    from pfedmoe_mpi.federation import effective

    settings = effective.with_listed(settings)
    with open_dataset(settings.data, settings.seed, clients=settings.clients) as dataset:
        return effective.apply_proposals(settings, dataset)


# Before the runs


def _heading(table: Table, runs: Sequence[TableRun], unfinished: Sequence[TableRun], out: Path) -> list[str]:
    done = len(runs) - len(unfinished)
    lines = [f"{table.title}\n{len(runs)} runs in {out}" + (f", {done} of them finished" if done else "")]
    for planned, rounds in sorted({(run.planned, run.config.rounds) for run in runs}):
        if rounds != planned:
            kind = "reduced" if rounds < planned else "other"
            share = f"{100 * rounds / planned:.3g} %"
            lines.append(
                f"{kind} scale: {rounds} rounds instead of the table's {planned} ({share}); reports mark this"
            )
    altered = runs[0].config.run.altered
    if altered:
        lines.append(f"settings that differ from the table: {', '.join(altered)}; reports mark this")
    return lines


def _plan(world: Comm, unfinished: Sequence[TableRun], rounds: Mapping[str, int], out: Path) -> list[str]:
    """Return the estimated cost of the remaining rounds: a line per group of runs that differ in their seed,
    and the totals.
    """
    if not unfinished:
        return []
    from pfedmoe_mpi.federation.disk import in_units
    from pfedmoe_mpi.reproduce import estimate

    whole_runs = estimate.costs(world, unfinished)
    costs = {run.name: whole_runs[run.name].share(rounds[run.name] / run.config.rounds) for run in unfinished}
    groups: dict[str, list[TableRun]] = {}
    for run in unfinished:
        groups.setdefault(run.group, []).append(run)
    width = max(map(len, groups))
    lines = [f"{'run':{width}}  runs  rounds  samples trained     hours      disk"]
    for group, members in groups.items():
        samples = sum(costs[run.name].samples for run in members)
        hours = sum(costs[run.name].seconds for run in members) / 3600
        planned = members[0].config.rounds
        space = in_units(sum(costs[run.name].disk.total for run in members))
        lines.append(
            f"{group:{width}}  {len(members):4}  {planned:6}  {samples:15,.0f}  {_format_hours(hours):>8}"
            f"  {space:>8}"
        )
    total = sum(rounds[run.name] for run in unfinished)
    samples = sum(cost.samples for cost in costs.values())
    hours = sum(cost.seconds for cost in costs.values()) / 3600
    ranks = f"{world.size} rank{'s' if world.size > 1 else ''} of this machine"
    lines.append(
        f"left to do: {len(unfinished)} runs, {total:,} rounds, {samples:,.0f} training samples, "
        f"about {_format_hours(hours)} hours of clients' training and evaluation on {ranks}"
    )
    return [*lines, _disk_line([cost.disk for cost in costs.values()], out)]


def _disk_line(uses: Sequence[DiskUse], out: Path) -> str:
    """Return a line on the disk space of all unfinished runs, beside the free space of the folder `out`."""
    from pfedmoe_mpi.federation.disk import in_units

    needed = sum(use.total for use in uses)
    line = f"disk: up to {in_units(needed)} when all are finished"
    try:
        existing = next(folder for folder in (out, *out.parents) if folder.exists())
        free = shutil.disk_usage(existing).free
    except OSError:
        return line
    few = "; this is not enough: --run.keep 1 keeps fewer checkpoints, --out FOLDER takes another disk"
    return f"{line}, {in_units(free)} free in {existing}" + (few if needed > free else "")


def _format_hours(hours: float) -> str:
    """Return hours with three digits, from 1000 on as a whole number."""
    return f"{hours:.3g}" if hours < 999.5 else f"{hours:,.0f}"


# The runs


def _train_all(
    world: Comm, unfinished: Sequence[TableRun], out: Path, train: Callable[[TableRun], int]
) -> int:
    """Train runs in order; a run that fails is reported, and the others are trained all the same."""
    failed: list[str] = []
    for number, run in enumerate(unfinished, 1):
        if any(world.gather(world.stop_requested(), "stop")):
            _print(world, [f"stopped before run {run.name}; run the same command again to resume"])
            return EXIT_STOPPED
        _print(world, ["", f"run {number} of {len(unfinished)}: {run.name}"])
        try:
            result = train(run)
        except RunError as error:
            if any(world.gather(world.stop_requested(), "stop")):
                raise
            failed.append(run.name)
            if world.rank == 0:
                print(f"error: {run.name}: {error}", file=sys.stderr, flush=True)
            continue
        if result != EXIT_DONE:
            _print(world, ["run the same command again to resume"])
            return result
    finished = (
        f"{len(unfinished) - len(failed)} runs finished; compare all in the folder: pfedmoe-mpi report {out}"
    )
    _print(world, ["", finished, *(f"failed: {name}" for name in failed)])
    return EXIT_FAULT if failed else EXIT_DONE


def _train_run(
    world: Comm, run: TableRun, folder: Path, changes: Mapping[str, Any], code: str, end: float | None
) -> int:
    """Start a run, or resume it in its folder with the `changes` that a restart allows."""
    world.timeout = TIMEOUT  # not that of the run before
    if world.from_root(RunFolder(folder).config.is_file, "run folder"):
        return restart.resume(world, folder, changes, code, end)
    # A folder without config.toml has nothing of a run, so it may be renamed.
    folder_settings = {"run.dir": str(folder), "run.force": True}
    return job.begin(world, config.changed(run.config, folder_settings), code, end)
