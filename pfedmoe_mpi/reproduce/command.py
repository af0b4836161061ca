"""The command `reproduce`: train the runs of a table, each in its own run folder.

All runs share one MPI session. A run depends on its configuration alone, whatever the process did before and
on however many ranks it is trained, so no launcher has to start between two runs, there is one process to
signal, and `mpirun -n K` means the same as for a single run. A fault ends the whole job. The same command
then skips finished runs and resumes the others from their checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfedmoe_mpi import checkpoint, config, environment
from pfedmoe_mpi.config import Config, recorded
from pfedmoe_mpi.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, StoppedError
from pfedmoe_mpi.models.names import resolve_name
from pfedmoe_mpi.mpi import session
from pfedmoe_mpi.mpi.comm import TIMEOUT, Comm
from pfedmoe_mpi.names import check_reachable
from pfedmoe_mpi.reproduce import grid, play, seeds, selection
from pfedmoe_mpi.reproduce.grid import Table, TableError, TableRun
from pfedmoe_mpi.reproduce.play import Outcome
from pfedmoe_mpi.run import job, restart
from pfedmoe_mpi.run.folder import RunFolder

if TYPE_CHECKING:
    from pfedmoe_mpi.federation.disk import DiskUse
    from pfedmoe_mpi.reproduce.estimate import Cost

AUTO = {
    "model.pool": ["auto"],
    "model.shared": "auto",
    "model.dim": 0,
    "gate.start": "auto",
}  # a run folder has the resolved values


@dataclass(frozen=True)
class ReproduceFlags:
    """Flags of the command that are not settings of the runs."""

    out: str = ""
    scale: float = 1.0
    only: str = ""
    task: str = ""
    dry: bool = False
    together: int = 1
    select: str = ""
    until: float = 0.0
    most: int = 20
    baseline: str = ""


def run(path: Path, settings: Mapping[str, Any], flags: ReproduceFlags, judge: seeds.Judge) -> int:
    """Print the estimated cost of a table's runs, then train them.

    Args:
        judge: says how well the seeds of finished runs determine differences, for `flags.until`.

    Raises:
        UserError: the table or a setting is invalid; nothing was written.
    """
    table = grid.read(path)
    runs = grid.expand(table, settings, flags.scale, flags.only, flags.task)
    rules = _rules(table, runs, flags) if flags.select else None
    if flags.until:
        seeds.check(table, runs, flags)
    end = environment.slurm_end() if environment.launched_rank() == 0 else None

    def work(world: Comm, code: str) -> int:
        play.check_together(flags.together, world)
        out = world.from_root(lambda: Path(flags.out or f"runs/{table.name}").absolute(), "folder")
        version = world.from_root(lambda: code, "code version")  # the first rank of every part records it
        world.stop_at = environment.stop_time(runs[0].config.run.walltime, end)
        stage = Stage(world, flags, settings, version, end)
        if not rules:
            return (
                seeds.play(stage, table, out, flags.only, judge)
                if flags.until
                else stage.play(table, runs, out)
            )
        ended = stage.play(table, runs, out / selection.GRID, choosing=True)
        if ended != EXIT_DONE or flags.dry:
            return ended
        _print(world, world.from_root(lambda: selection.write(table, runs, rules, out), "the choice"))
        selected = world.from_root(lambda: grid.read(out / selection.FILE), "the chosen settings")
        if flags.until:
            return seeds.play(stage, selected, out / selection.FRESH, "", judge, rules.seeds, compared=out)
        chosen = grid.expand(selected, settings, flags.scale)
        return stage.play(selected, chosen, out / selection.FRESH, compared=out)

    content = {f"table.{name}": value for name, value in vars(table).items() if name != "path"}
    given = {"command": "reproduce", **vars(flags), **content, **settings}
    return session.under_mpi(work, given, runs[0].config.run.singleton)


def _rules(table: Table, runs: Sequence[TableRun], flags: ReproduceFlags) -> selection.Criteria:
    """Return what is chosen among the runs.

    Raises:
        TableError: only some of the runs are asked for, or nothing can be chosen among them.
    """
    if flags.only or flags.task:
        name, value = ("only", flags.only) if flags.only else ("task", flags.task)
        raise TableError(
            f"--{name} = {value} leaves out candidates, and --select compares all of them",
            f"remove --{name}; single runs without --select: --out {flags.out or f'runs/{table.name}'}/grid",
        )
    return selection.criteria(table, runs)


@dataclass(frozen=True)
class Stage:
    """What playing a table takes besides its runs; `code`: the program's version, `end`: Slurm's (rank 0)."""

    world: Comm
    flags: ReproduceFlags
    settings: Mapping[str, Any]
    code: str
    end: float | None

    def play(
        self,
        table: Table,
        runs: Sequence[TableRun],
        out: Path,
        choosing: bool = False,
        compared: Path | None = None,
    ) -> int:
        """Print the estimated cost of the unfinished runs, and train them; collective. Return the exit code.

        Args:
            choosing: runs that diverge are candidates that lose, not failures.
            compared: the folder for `report`; default: `out`.

        Raises:
            UserError: on all ranks: a folder contains other runs, or the data cannot be used.
        """
        world = self.world
        rounds = world.from_root(
            lambda: {run.name: _rounds_left(out / run.name, run, choosing) for run in runs}, "runs"
        )
        unfinished = [run for run in runs if rounds[run.name]]
        _print(world, _heading(table, runs, unfinished, out))
        parts = max(1, min(self.flags.together, len(unfinished)))
        try:
            costs = _costs(world, unfinished, rounds, parts)
            _print(world, _plan(world, unfinished, rounds, costs, parts, out))
        except StoppedError:  # raised on all ranks; nothing is lost
            _print(world, ["stopped before the first run; run the same command again to resume"])
            return EXIT_STOPPED
        if self.flags.dry:
            return EXIT_DONE
        changes = {name: value for name, value in self.settings.items() if grid.is_harmless(name)}

        def train(comm: Comm, run: TableRun) -> int:
            return _train_run(comm, run, out / run.name, changes, self.code, self.end)

        seconds = {name: cost.seconds for name, cost in costs.items()}
        outcome = play.play(world, unfinished, seconds, parts, train)
        if choosing and not outcome.stopped:
            outcome = world.from_root(lambda: _without_diverged(outcome, out), "runs that diverged")
            if not outcome.failed:
                return EXIT_DONE
        return _finish(world, outcome, unfinished, compared or out)


def _without_diverged(outcome: Outcome, out: Path) -> Outcome:
    """Return the outcome without the failures of runs that diverged."""
    failed = {n: c for n, c in outcome.failed.items() if not selection.diverged(RunFolder(out / n))}
    return Outcome(failed, outcome.stopped)


def _print(world: Comm, lines: Sequence[str]) -> None:
    """Print lines, on rank 0 only."""
    if world.rank == 0 and lines:
        print("\n".join(lines), flush=True)


def _rounds_left(folder: Path, run: TableRun, choosing: bool) -> int:
    """Return the rounds that a run has left according to its folder: 0 if it is finished, else at least 1.

    While settings are being chosen, a run that diverged counts as finished: it would diverge again.

    Raises:
        ConfigError: the folder contains a run with other settings, or cannot be reached.
    """
    check_reachable(folder, ConfigError)
    run_folder = RunFolder(folder)
    if not run_folder.config.is_file():
        return run.config.rounds
    earlier = recorded.with_defaults(config.read_toml(run_folder.config))
    differences = _differences(earlier, run.config)
    if differences:
        differences = _differences(earlier, _apply_proposals(run.config))
    if differences:
        problem = f"{folder} contains a run with other settings: {'; '.join(differences)}"
        raise ConfigError(problem, "name another folder with --out, or repeat the flags of the first start")
    if run_folder.finished or (choosing and selection.diverged(run_folder)):
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
        and (name == "rounds" or not grid.is_harmless(name))
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


def _costs(
    world: Comm, unfinished: Sequence[TableRun], rounds: Mapping[str, int], parts: int
) -> dict[str, Cost]:
    """Return the estimated cost of each run's remaining rounds, on one of `parts` parts of the ranks."""
    from pfedmoe_mpi.reproduce import estimate

    whole_runs = estimate.costs(world, unfinished, world.size // parts) if unfinished else {}
    return {run.name: whole_runs[run.name].share(rounds[run.name] / run.config.rounds) for run in unfinished}


def _plan(
    world: Comm,
    unfinished: Sequence[TableRun],
    rounds: Mapping[str, int],
    costs: Mapping[str, Cost],
    parts: int,
    out: Path,
) -> list[str]:
    """Return the estimated cost of the remaining rounds: a line per group of runs that differ in their seed,
    and the totals.
    """
    if not unfinished:
        return []
    from pfedmoe_mpi.federation.disk import in_units

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
    seconds = {name: cost.seconds for name, cost in costs.items()}
    hours = max(sum(seconds[name] for name in part) for part in play.shares(seconds, parts)) / 3600
    ranks = f"{world.size} rank{'s' if world.size > 1 else ''} of this machine"
    ranks += f", {parts} runs at once" if parts > 1 else ""
    lines.append(
        f"left to do: {len(unfinished)} runs, {total:,} rounds, {samples:,.0f} training samples, "
        f"about {_format_hours(hours)} hours of clients' training and evaluation on {ranks}"
    )
    return [*lines, _disk_line([cost.disk for cost in costs.values()], out)]


def _disk_line(uses: Sequence[DiskUse], out: Path) -> str:
    """Return a line on the disk space of all unfinished runs, beside the free space of the folder `out`."""
    from pfedmoe_mpi.federation.disk import free_space, free_text, in_units

    needed, (free, existing) = sum(use.total for use in uses), free_space(out)
    meanwhile = needed + max(use.spare for use in uses)
    line = f"disk: up to {in_units(needed)} when all are finished, {in_units(meanwhile)} before"
    few = "; this is not enough: --run.keep 1 keeps fewer checkpoints, --out FOLDER takes another disk"
    return line + free_text(free, existing) + (few if meanwhile > free else "")


def _format_hours(hours: float) -> str:
    """Return hours with three digits, from 1000 on as a whole number."""
    return f"{hours:.3g}" if hours < 999.5 else f"{hours:,.0f}"


# The runs


def _finish(world: Comm, outcome: Outcome, runs: Sequence[TableRun], out: Path) -> int:
    """Print how the runs ended, unless they were stopped; return the exit code."""
    if not outcome.stopped:
        number = len(runs) - len(outcome.failed)
        finished = f"{number} run{'' if number == 1 else 's'} finished"
        compare = f"compare all in the folder: pfedmoe-mpi report {out}"
        _print(world, ["", f"{finished}; {compare}", *(f"failed: {name}" for name in outcome.failed)])
    return outcome.code


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
