"""Settings chosen on validation rows: which runs of a table compete, who wins, and the table of the winners.

The table's axes other than `seed` are divided in two. The points of the axes in `over` compete; there is one
choice for every combination of the others, such as a method and a data set. All candidates of a choice are
trained with the same seeds on the same rows. The best has the highest mean, over these seeds, of the accuracy
on validation rows in the best round of each run. `selected.toml` is a table itself: the chosen settings, with
seeds that took no part in the choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation.selection import VALIDATION, best, mean
from pfedmoe_mpi.reproduce.grid import Table, TableError, TableRun
from pfedmoe_mpi.run.folder import RunFolder
from pfedmoe_mpi.storage import durable, untrusted_json

FILE, GRID, FRESH = "selected.toml", "grid", "fresh"  # in the folder of all runs: the choice, and both stages
FRESH_SEEDS = 5  # from the one after the largest of the choice on: enough for an interval
# Settings that define the problem: an axis of these does not compete unless `over` names it.
PROBLEM = ("data.", "partition.", "clients", "participation", "unseen.", "join.", "stream.", "faults.")


@dataclass(frozen=True)
class Criteria:
    """The axes that compete, and the seeds of the choice and of the chosen settings."""

    over: tuple[str, ...]
    seeds: tuple[int, ...]
    fresh: tuple[int, ...]


def criteria(table: Table, runs: Sequence[TableRun]) -> Criteria:
    """Return what is chosen among a table's runs, from its section `select`.

    Raises:
        TableError: the section is invalid, nothing competes, or a run has no validation rows.
    """
    for name in table.select:
        if name not in {"over", "fresh"}:
            raise _error(table, f"has select.{name}", "use over = [AXES] and fresh = [SEEDS] in [select]")
    default = [name for name, points in table.axes.items() if name != "seed" and _competes(points)]
    over, seeds = table.select.get("over", default), sorted({run.config.seed for run in runs})
    others = [name for name in table.axes if name != "seed"]
    if not isinstance(over, list) or not over or not all(name in others for name in over):
        listed = ", ".join(f'"{name}"' for name in others) or '"train.lr"'
        raise _error(
            table, f"has select.over = {over}", f"name axes to choose on: [select] over = [{listed}]"
        )
    first = max(seeds) + 1
    fresh = table.select.get("fresh", list(range(first, first + FRESH_SEEDS)))
    if not isinstance(fresh, list) or not fresh or not all(type(seed) is int and seed >= 0 for seed in fresh):
        raise _error(table, f"has select.fresh = {fresh}", f"list seeds: fresh = [{first}, {first + 1}]")
    if set(fresh) & set(seeds):
        problem = f"has seeds of the choice in select.fresh: {', '.join(map(str, set(fresh) & set(seeds)))}"
        raise _error(table, problem, f"use other seeds: fresh = [{first}, {first + 1}]")
    without = next((run.name for run in runs if not run.config.partition.validation), "")
    if without:
        problem = f"has no validation rows in run {without}: partition.validation = 0"
        raise _error(table, problem, "--partition.validation 0.2, or set it in [base]")
    drawn = next((run.name for run in runs if run.config.eval.clients), "")
    if drawn:
        problem = f"measures other clients in every round of run {drawn}: eval.clients"
        raise _error(table, problem, "--eval.clients 0, because rounds are compared")
    return Criteria(tuple(over), tuple(seeds), tuple(fresh))


def _competes(points: Sequence[Any]) -> bool:
    names = [name for point in points for name in point.settings]
    return "algorithm" not in names and not all(name.startswith(PROBLEM) for name in names)


def _error(table: Table, problem: str, remedy: str) -> TableError:
    return TableError(f"the table {table.path} {problem}", remedy)


@dataclass(frozen=True)
class Result:
    """What a run of the choice reached: its best accuracy on validation rows, NaN if it diverged."""

    accuracy: float
    rows: tuple[Any, Any]  # digests of its data and partition


def diverged(folder: RunFolder) -> bool:
    """Return whether a run ended because it diverged; it would do so again."""
    last = folder.last_event
    return bool(last.get("event") == "error" and last.get("diverged"))


def result(folder: RunFolder) -> Result:
    """Return what a run reached.

    Raises:
        ConfigError: it is not finished, or was not measured on validation rows.
    """
    again = "run the same command again, which resumes it"
    if not folder.finished and not diverged(folder):
        raise ConfigError(f"nothing can be chosen, because run {folder.path} is not finished", again)
    start = folder.last_start
    rows = (start.get("data_digest"), start.get("partition_digest"))
    if diverged(folder):
        return Result(math.nan, rows)
    try:
        top = best(untrusted_json.read_lines(folder.metrics), on=VALIDATION)
    except (OSError, untrusted_json.UnusableError) as error:
        remedy = f"rewrite the file from the checkpoint: pfedmoe-mpi restart {folder.path}"
        raise ConfigError(f"{folder.metrics} cannot be read: {error}", remedy) from error
    value = mean(top, VALIDATION) if top else None
    if value is None:
        problem = f"run {folder.path} has no accuracy on validation rows"
        raise ConfigError(problem, "set --partition.validation 0.2, and name another folder with --out")
    return Result(value, rows)


def choose(
    table: Table, runs: Sequence[TableRun], rules: Criteria, results: Mapping[str, Result]
) -> dict[str, Any]:
    """Return the table of the chosen settings, as TOML's tree, with a record of each choice in `chosen`.

    Args:
        runs: all runs of the table, in order.
        results: what each run reached, by its name.

    Raises:
        ConfigError: candidates were measured on unlike rows, or all of them diverged.
    """
    kept = [axis for axis in table.axes if axis != "seed" and axis not in rules.over]
    choices: dict[str, dict[str, list[tuple[TableRun, Mapping[str, Any]]]]] = {}
    for number, run in enumerate(runs):
        points = table.points(number)
        settings = {n: v for axis, p in points.items() if axis != "seed" for n, v in p.settings.items()}
        choice = "+".join(points[axis].label for axis in kept) or "chosen"
        candidate = "-".join(points[axis].label for axis in rules.over)
        choices.setdefault(choice, {}).setdefault(candidate, []).append((run, settings))
    chosen, records = {}, []
    for choice, candidates in choices.items():
        found = {name: [results[run.name] for run, _ in members] for name, members in candidates.items()}
        winner = _winner(table, choice, found)
        chosen[choice] = dict(candidates[winner][0][1])
        scores = [
            {"candidate": name, "accuracies": [each.accuracy for each in of_seeds]}
            for name, of_seeds in found.items()
        ]
        records.append(
            {"choice": choice, "candidate": winner, "seeds": list(rules.seeds), "candidates": scores}
        )
    axis = "algorithm" if kept == ["algorithm"] else "selected"
    seeds = {f"seed{seed}": {"seed": seed} for seed in rules.fresh}
    return {
        "title": f"{table.title}: settings chosen on validation rows",
        "floor": table.floor,
        "in_rounds": list(table.in_rounds),
        "base": _nested(table.base),
        "axis": {axis: {name: _nested(settings) for name, settings in chosen.items()}, "seed": seeds},
        "chosen": records,
    }


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by section."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        section, _, last = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[last] = value
    return tree


def _winner(table: Table, choice: str, found: Mapping[str, Sequence[Result]]) -> str:
    """Return the first of the candidates with the highest mean; one that diverged is none.

    Raises:
        ConfigError: their rows differ, or all diverged.
    """
    rows = {name: [each.rows for each in results] for name, results in found.items()}
    first = next(iter(rows))
    unlike = next((name for name in rows if rows[name] != rows[first]), "")
    if unlike:
        problem = f"candidates {first} and {unlike} of {choice} have unlike rows, so nothing can be chosen"
        raise _error(table, problem, "leave axes that change data or partition out of select.over")
    means = {name: fmean(each.accuracy for each in results) for name, results in found.items()}
    finite = {name: value for name, value in means.items() if math.isfinite(value)}
    if not finite:
        raise _error(table, f"has no candidate of {choice} that did not diverge", "add lower learning rates")
    return max(finite, key=lambda name: finite[name])


def write(table: Table, runs: Sequence[TableRun], rules: Criteria, out: Path) -> list[str]:
    """Choose among finished runs in `out`/GRID and write `out`/FILE; return lines on the choices.

    Raises:
        ConfigError: a run is missing or not finished, nothing can be chosen, or the file cannot be written.
    """
    import tomli_w

    results = {run.name: result(RunFolder(out / GRID / run.name)) for run in runs}
    tree = choose(table, runs, rules, results)
    try:
        durable.write_text(out / FILE, tomli_w.dumps(tree))
    except OSError as error:
        problem = f"{out / FILE} cannot be written: {error}"
        raise ConfigError(problem, "free space, or name another folder with --out") from error
    lines = [f"chosen by accuracy on validation rows, mean over seeds {', '.join(map(str, rules.seeds))}:"]
    for record in tree["chosen"]:
        listed = [f"{each['candidate']} {_percent(each['accuracies'])}" for each in record["candidates"]]
        lines.append(f"  {record['choice']}: {record['candidate']} ({', '.join(listed)})")
    return [*lines, f"wrote {out / FILE}"]


def _percent(accuracies: Sequence[float]) -> str:
    value = fmean(accuracies)
    return f"{100 * value:.2f} %" if math.isfinite(value) else "diverged"
