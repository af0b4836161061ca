"""`reproduce`: the runs of a table one after the other, each in a run folder of its own below one folder.

All runs are played in one MPI session. A run is a function of its configuration alone, whatever the process
did before it, so that no launcher has to start between two runs, a signal has one place to arrive, and
`mpirun -n K` means what it means for a single run. A fault ends the whole job; called again, `reproduce`
passes over finished runs and takes the others up from their checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfedmoe_mpi import checkpoint, config, environment
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, ConfigError, RunError, StoppedError
from pfedmoe_mpi.models.names import resolve_name
from pfedmoe_mpi.mpi import session
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.reproduce import grid
from pfedmoe_mpi.reproduce.grid import Table, TableRun
from pfedmoe_mpi.run import job, restart
from pfedmoe_mpi.run.folder import RunFolder

# What an earlier start of a run may have otherwise: paths and speed.
FREE = tuple(name for name in grid.HARMLESS if name != "rounds")
AUTO = {"model.pool": ["auto"], "model.shared": "auto", "model.dim": 0}  # resolved in a run's folder


@dataclass(frozen=True)
class Asked:
    """What the command line says beside the table's name and the settings."""

    out: str = ""
    scale: float = 1.0
    only: str = ""
    task: str = ""
    dry: bool = False


def run(path: Path, settings: Mapping[str, Any], asked: Asked) -> int:
    """Show what a table costs, then play its runs.

    Raises:
        UserError: a table or a setting that will not do; nothing was written.
    """
    table = grid.read(path)
    runs = grid.chosen(grid.expand(table, settings, asked.scale), asked.only, asked.task)
    end = environment.slurm_end() if environment.launched_rank() == 0 else None
    out = Path(asked.out or f"runs/{table.name}").absolute()

    def work(world: Comm, code: str) -> int:
        world.stop_at = environment.stop_at(runs[0].config.run.walltime, end)
        rounds = world.from_root(
            lambda: {run.name: _rounds_left(out / run.name, run) for run in runs}, "runs"
        )
        left = [run for run in runs if rounds[run.name]]
        _tell(world, _heading(table, runs, left, out))
        try:
            _tell(world, _plan(world, left, rounds))
        except StoppedError:  # met by all ranks; nothing is lost
            _tell(world, ["stopped before the first run; the same command goes on"])
            return EXIT_STOPPED
        if asked.dry:
            return EXIT_DONE
        anew = {name: value for name, value in settings.items() if name.startswith(grid.HARMLESS)}
        return _play(world, left, out, lambda run: _play_one(world, run, out / run.name, anew, code, end))

    return session.under_mpi(work, runs[0].config.run.singleton)


def _tell(world: Comm, lines: Sequence[str]) -> None:
    if world.rank == 0 and lines:
        print("\n".join(lines), flush=True)


def _rounds_left(folder: Path, run: TableRun) -> int:
    """What a run still has to do, by its folder; 0 where it is finished, else 1 at least.

    Raises:
        ConfigError: the folder is that of a run with other settings.
    """
    held = RunFolder(folder)
    if not held.config.is_file():
        return run.config.rounds
    then = config.read_toml(held.config)
    differing = _differing(then, run.config)
    if differing:
        differing = _differing(then, _with_proposals(run.config))
    if differing:
        problem = f"{folder} holds a run with other settings: {'; '.join(differing)}"
        raise ConfigError(problem, "choose another --out, or give the flags of the first time")
    if held.finished:
        return 0
    newest = checkpoint.newest_first(held.checkpoints)[:1]
    done = max((int(path.stem.split("-")[1]) - ("partial" in path.stem) for path in newest), default=0)
    return max(1, run.config.rounds - done)


def _differing(then: Mapping[str, Any], now: Config) -> list[str]:
    return [
        f"{name} {then[name]} → {value}"
        for name, value in config.flatten(config.to_tree(now)).items()
        if name in then
        and then[name] != _resolved(name, value)
        and value != AUTO.get(name)
        and not name.startswith(FREE)
    ]


def _resolved(name: str, value: Any) -> Any:
    """Architectures by the names that a run's folder has them."""
    if name not in {"model.pool", "model.shared"} or value == AUTO[name]:
        return value
    return resolve_name(value) if isinstance(value, str) else [resolve_name(each) for each in value]


def _with_proposals(settings: Config) -> Config:
    from pfedmoe_mpi.data.sources.open import open_dataset
    from pfedmoe_mpi.federation import effective

    with open_dataset(settings.data, settings.seed, clients=settings.clients) as dataset:
        return effective.with_proposals(settings, dataset)


# What is said before


def _heading(table: Table, runs: Sequence[TableRun], left: Sequence[TableRun], out: Path) -> list[str]:
    done = len(runs) - len(left)
    lines = [f"{table.title}\n{len(runs)} runs in {out}" + (f", {done} of them finished" if done else "")]
    for planned, rounds in sorted({(run.planned, run.config.rounds) for run in runs}):
        if rounds != planned:
            kind = "reduced" if rounds < planned else "other"
            share = f"{100 * rounds / planned:.3g} %"
            lines.append(
                f"{kind} scale: {rounds} rounds where the table has {planned} ({share}), marked in reports"
            )
    altered = runs[0].config.run.altered
    if altered:
        lines.append(f"other settings than the table's: {', '.join(altered)}, marked in reports")
    return lines


def _plan(world: Comm, left: Sequence[TableRun], rounds: Mapping[str, int]) -> list[str]:
    """A line per group of runs that differ in their seed, and the sum, of the rounds that are left."""
    if not left:
        return []
    from pfedmoe_mpi.reproduce import estimate

    whole = estimate.costs(world, left)
    costs = {run.name: whole[run.name].share(rounds[run.name] / run.config.rounds) for run in left}
    groups: dict[str, list[TableRun]] = {}
    for run in left:
        groups.setdefault(run.group, []).append(run)
    width = max(map(len, groups))
    lines = [f"{'run':{width}}  runs  rounds  samples trained     hours"]
    for group, members in groups.items():
        samples = sum(costs[run.name].samples for run in members)
        hours = sum(costs[run.name].seconds for run in members) / 3600
        each = members[0].config.rounds
        lines.append(f"{group:{width}}  {len(members):4}  {each:6}  {samples:15,.0f}  {_spelt(hours):>8}")
    total = sum(rounds[run.name] for run in left)
    samples = sum(cost.samples for cost in costs.values())
    hours = sum(cost.seconds for cost in costs.values()) / 3600
    where = f"{world.size} rank{'s' if world.size > 1 else ''} of this machine"
    lines.append(
        f"left to do: {len(left)} runs, {total:,} rounds, {samples:,.0f} training samples, "
        f"about {_spelt(hours)} hours of clients' training and tests on {where}"
    )
    return lines


def _spelt(hours: float) -> str:
    """Three digits, or whole hours where these are thousands."""
    return f"{hours:.3g}" if hours < 999.5 else f"{hours:,.0f}"


# The runs


def _play(world: Comm, left: Sequence[TableRun], out: Path, play: Callable[[TableRun], int]) -> int:
    """The runs in order; one that cannot go on is told, and the others are played all the same."""
    failed: list[str] = []
    for number, run in enumerate(left, 1):
        if any(world.gather(world.stop_requested(), "stop")):
            _tell(world, [f"stopped before run {run.name}; the same command goes on"])
            return EXIT_STOPPED
        _tell(world, ["", f"run {number} of {len(left)}: {run.name}"])
        try:
            result = play(run)
        except RunError as error:
            if any(world.gather(world.stop_requested(), "stop")):
                raise
            failed.append(run.name)
            if world.rank == 0:
                print(f"error: {run.name}: {error}", file=sys.stderr, flush=True)
            continue
        if result != EXIT_DONE:
            _tell(world, ["the same command goes on with it"])
            return result
    ended = f"{len(left) - len(failed)} runs are finished; `report {out}` compares all that lie there"
    _tell(world, ["", ended, *(f"could not go on: {name}" for name in failed)])
    return EXIT_FAULT if failed else EXIT_DONE


def _play_one(
    world: Comm, run: TableRun, folder: Path, anew: Mapping[str, Any], code: str, end: float | None
) -> int:
    """From the start, or from where its folder stands, with the flags that a restart may have otherwise."""
    if world.from_root(RunFolder(folder).config.is_file, "run folder"):
        return restart.resume(world, folder, anew, code, end)
    ours = {"run.dir": str(folder), "run.force": True}  # without config.toml it holds nothing of a run
    return job.begin(world, config.changed(run.config, ours), code, end)
