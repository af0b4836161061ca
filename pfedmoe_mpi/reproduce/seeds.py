"""More seeds for a table, until its differences from a baseline are known to a given width.

Seeds are added by what the earlier ones show, so an interval covers the true difference a little less often
than it says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pfedmoe_mpi import config
from pfedmoe_mpi.errors import EXIT_DONE, EXIT_STOPPED
from pfedmoe_mpi.reproduce import grid
from pfedmoe_mpi.reproduce.grid import Point, Table, TableError, TableRun
from pfedmoe_mpi.reproduce.selection import PROBLEM

if TYPE_CHECKING:
    from pfedmoe_mpi.reproduce.command import ReproduceFlags, Stage


FEW = 5  # seeds, below which there is no interval


class Precision(Protocol):
    """How well seeds determine differences; see `report.precision`."""

    @property
    def width(self) -> float: ...
    @property
    def needed(self) -> int: ...
    @property
    def lines(self) -> Sequence[str]: ...


Judge = Callable[
    [Sequence[Path], str, float], Precision
]  # of run folders, the baseline and the width in points


def check(table: Table, runs: Sequence[TableRun], flags: ReproduceFlags) -> None:
    """Refuse `--until` where there are no seeds to add, or nothing to compare.

    Raises:
        TableError: so it is.
    """
    if "seed" not in table.axes:
        problem = f"--until = {flags.until:g} adds seeds, and the table {table.path} has no axis seed"
        raise TableError(problem, "write seed = [0, 1, 2, 3, 4] below [axis]")
    if flags.task:
        problem = f"--task = {flags.task} is one run, and --until = {flags.until:g} compares several"
        raise TableError(problem, "remove --task or --until")
    first = len(table.axes["seed"])
    if flags.most < first and not flags.select:
        problem = f"--most = {flags.most} is less than the {first} seeds of the table"
        raise TableError(problem, f"--most {max(FEW, 2 * first)}")
    if flags.most < FEW:
        problem = f"--most = {flags.most}, but there is no interval below {FEW} seeds"
        raise TableError(problem, f"--most {FEW} or more")
    methods = {run.config.method for run in runs}
    base = (flags.baseline or "standalone").replace("-", "_")
    if base.partition(" (")[0] not in methods or len({run.group for run in runs}) < 2:
        problem = f"--until = {flags.until:g} compares the others with {base}, and the runs have only: "
        problem += ", ".join(sorted(methods))
        raise TableError(problem, "name one of several methods: --baseline NAME")
    if " (" not in base and not flags.select:  # which chooses one
        _check_single([run for run in runs if run.config.method == base], base)


def _check_single(runs: Sequence[TableRun], base: str) -> None:
    """Refuse a baseline of which the table has several in one problem.

    Raises:
        TableError: with the label of one of them.
    """
    variants: dict[frozenset[tuple[str, str]], list[set[tuple[str, str]]]] = {}
    for run in runs:
        settings = config.flatten(config.to_tree(run.config)).items()
        told = {(name, f"{value}") for name, value in settings if not name.startswith(("seed", "run."))}
        problem = frozenset(item for item in told if item[0].startswith((*PROBLEM, "rounds")))
        found = variants.setdefault(problem, [])
        found += [told] if told not in found else []
    for found in variants.values():
        if len(found) > 1:
            differing = ", ".join(f"{n} = {v}" for n, v in sorted(found[0] - found[1]))
            raise TableError(
                f"the baseline {base} is not one method: the table has {len(found)} of its settings",
                f"name one as in reports, such as --baseline '{base} ({differing})'",
            )


def play(
    stage: Stage,
    table: Table,
    out: Path,
    only: str,
    judge: Judge,
    taken: Collection[int] = (),
    compared: Path | None = None,
) -> int:
    """Train a table's runs, then those of more seeds, until the differences are narrow enough or `flags.most`
    seeds are done; collective. Return the exit code.

    Args:
        taken: seeds that may not be added.
        compared: as for `Stage.play`.

    Raises:
        UserError: on all ranks: see `Stage.play` and `report.precision`.
    """
    flags, world = stage.flags, stage.world
    while True:
        runs = grid.expand(table, stage.settings, flags.scale, only)
        ended = stage.play(table, runs, out, compared=compared)
        if ended != EXIT_DONE or flags.dry:
            if world.rank == 0 and ended not in {EXIT_DONE, EXIT_STOPPED}:
                print("no seeds are added while a run fails; --only PATTERN,... leaves out runs", flush=True)
            return ended
        folders = [out / run.name for run in runs]
        found = world.from_root(partial(judge, folders, flags.baseline, flags.until), "differences")
        number = len(table.axes["seed"])
        if world.rank == 0:
            print("", *found.lines, sep="\n", flush=True)
        if found.width < flags.until or number >= flags.most:
            return EXIT_DONE
        more = min(max(found.needed, number + 1), max(2 * number, FEW), flags.most)
        table = with_seeds(table, more, taken)


def with_seeds(table: Table, number: int, taken: Collection[int]) -> Table:
    """Return a table with this many seeds: its own, and those after the largest of them and of `taken`."""
    points = list(table.axes["seed"])
    largest = max(*(int(point.settings["seed"]) for point in points), *taken, 0)
    more = range(largest + 1, largest + 1 + number - len(points))
    points += [Point(f"seed{seed}", {"seed": seed}) for seed in more]
    return replace(table, axes={**table.axes, "seed": points})
