"""Forks and changed restarts in reports: how they are grouped and named, and what their rounds took."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pfedmoe_mpi.report import compare, comparison_report, epsilon_section, paper_section
from pfedmoe_mpi.report.costs import operations, reached, total
from pfedmoe_mpi.report.load import Run, load_run
from pfedmoe_mpi.report.periods import periods, with_trunks
from support.launcher import SMALL_RUN, Session
from support.report_runs import like

SWITCH = "gate.weights = sample until round 2, then equal"


@pytest.fixture(scope="module")
def folder(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three rounds, with forks of it, a restart of one and one of itself, and another seed."""
    made = tmp_path_factory.mktemp("forks")
    new = (*SMALL_RUN, "--rounds", "3", "--eval.every", "2")
    equal = ("--gate.weights", "equal")
    lines: list[tuple[str, ...]] = [
        (*new, "--run.checkpoint_every", "1", "--run.keep", "9", "--run.dir", "run"),
        ("fork", "run", "--at", "1", *equal, "--run.dir", "early"),
        ("fork", "run", "--at", "2", *equal, "--run.dir", "late"),
        ("fork", "run", "--at", "2", "--algorithm", "standalone", "--run.dir", "alone"),
        ("fork", "late", "--at", "3", "--train.lr", "0.01", "--rounds", "4", "--run.dir", "twice"),
        (*new, *equal, "--seed", "1", "--run.dir", "seed1"),
    ]
    for line in lines:
        assert (result := session(*line, cwd=made)).code == 0, result.err
    for name, flags in (("late", ("--train.epochs", "2")), ("run", ("--train.lr", "0.01"))):
        shutil.copytree(made / name, made / f"restarted/{name}")
        result = session("restart", f"restarted/{name}", "--rounds", "4", *flags, cwd=made)
        assert result.code == 0, result.err
    return made


@pytest.fixture
def load(folder: Path) -> Callable[..., list[Run]]:
    """Return a function that loads runs of `folder` as a report does."""
    return lambda *names: with_trunks([load_run(folder / name) for name in names])


def test_fork_is_no_seed_of_ordinary_runs(load: Callable[..., list[Run]]) -> None:
    late, other = load("late", "seed1")
    found = compare.compare([late, other])
    assert found.methods == (f"pfedmoe ({SWITCH})", "pfedmoe (gate.weights = equal)")
    (group,) = compare.compare([late, like(late, "b", seed=1)]).groups
    assert len(group.runs) == 2, "forks of one round with unlike seeds are replicates"
    (note,) = compare.compare([late]).notes
    assert note == f"changed during training: pfedmoe {SWITCH}"
    assert compare.compare([late, *load("restarted/late")]).notes.count(note) == 1


def test_forks_of_unlike_rounds_are_compared(load: Callable[..., list[Run]]) -> None:
    found = compare.compare(load("run", "early", "late"))
    switch = "pfedmoe (gate.weights = sample until round {}, then equal)"
    assert found.methods == ("pfedmoe (gate.weights = sample)", switch.format(1), switch.format(2))
    assert not found.notes


def test_fork_to_another_method_is_no_baseline(load: Callable[..., list[Run]]) -> None:
    run, alone = load("run", "alone")
    found = compare.compare([run, alone])
    assert found.methods == ("pfedmoe", "pfedmoe until round 2, then standalone")
    assert found.baseline("") is None and found.baseline("pfedmoe") == "pfedmoe"
    whole = Run(Path("b"), {**alone.config}, alone.history, run.events)
    assert compare.compare([run, alone, whole]).baseline("") == "standalone"


def test_restart_with_another_setting_is_no_seed(load: Callable[..., list[Run]]) -> None:
    (run,) = load("restarted/run")
    other = Run(Path("b"), {**run.config, "seed": 1}, run.history, run.events[:1])
    changed = f"train.lr = {run.events[-2]['changes']['train.lr'][0]} until round 3, then 0.01"
    assert compare.compare([run, other]).methods == (f"pfedmoe ({changed})", "pfedmoe (train.lr = 0.01)")
    moved = {"eval.batch": [1, 2], "data.path": ["a", "b"], "train.threads": [1, 2], "rounds": [3, 4]}
    again = Run(run.path, run.config, run.history, [*run.events[:-2], {**run.events[-2], "changes": moved}])
    assert len(compare.compare([again, other]).groups) == 1, "as if it had not stopped"
    cosine = replace(again, config={**run.config, "train.schedule": "cosine"})
    assert compare.labels([cosine])[1] == (
        "changed during training: pfedmoe rounds = 3 until round 3, then 4",
    )


def test_changed_runs_are_not_as_the_table(load: Callable[..., list[Run]]) -> None:
    late, run = load("late", "run")
    assert paper_section._changes(run) == "as the table"
    assert paper_section._changes(late) == f"changed during training: {SWITCH}"


def test_fork_without_noise_is_not_the_run_without(load: Callable[..., list[Run]]) -> None:
    (late,) = load("late")
    ended = {**late.events[0], "changes": {"privacy.noise": [1.0, 0.0]}}
    line = epsilon_section._without_privacy(replace(late, events=[ended]))
    assert line.config["privacy.noise"] == "1.0 until round 2, then 0.0" and "privacy.clip" not in line.config


def test_each_start_counts_its_own_rounds(load: Callable[..., list[Run]]) -> None:
    """The rounds before a fork took what its run recorded, whatever the fork trains."""
    run, late, alone, longer = load("run", "late", "alone", "restarted/late")
    whole = operations(run)
    assert None not in whole and operations(late)[:2] == operations(alone)[:2] == whole[:2]
    assert len({operations(each)[2] for each in (run, late, alone)}) == 3
    assert operations(longer)[:3] == operations(late)
    third, fourth = operations(longer)[2:]
    assert third and fourth == 2 * third, "the restart trains two epochs"
    target = run.history[1]["accuracy"]["mean"]
    costs = [reached(each, target) for each in (run, late, alone)]
    assert {cost.operations for cost in costs if cost} == {total(whole[:2])} and all(costs)


def test_operations_that_another_folder_has_are_unknown(load: Callable[..., list[Run]], folder: Path) -> None:
    (late,) = load("late")
    first, second, third = operations(late)
    assert first is second is None and third and total([first, third]) is None
    (table,) = [table for table in _tables([late, load_run(folder / "seed1")]) if table.name == "cost"]
    assert [row[4].values[0] is None for row in table.rows] == [True, False]
    (unlike,) = load("seed1")
    unlike = replace(unlike, path=folder / "run")
    assert operations(with_trunks([late, unlike])[0])[0] is None, "other rounds than the fork's"
    assert operations(with_trunks([late, load("run")[0]])[0]) == operations(load("run", "late")[1])
    (renamed,) = load("run")
    renamed = replace(renamed, path=folder / "elsewhere")
    assert operations(with_trunks([late, renamed])[0]) == operations(load("run", "late")[1]), "told by rounds"
    *_, twice = load("run", "late", "twice")
    assert operations(twice)[:3] == operations(load("run", "late")[1])
    assert [period.after for period in periods(twice)] == [0, 2, 3]


def test_rounds_trained_again_are_those_of_the_last_start(load: Callable[..., list[Run]]) -> None:
    """Round 3 was first trained in two epochs, from a checkpoint that was damaged later."""
    (run,) = load("run")

    def epochs(before: int, now: int, round: int, **more: Any) -> dict[str, Any]:
        changes = {"train.epochs": [before, now]} if before != now else {}
        return {**run.events[0], "event": "restart", "round": round, "changes": changes, **more}

    def rounds(*starts: dict[str, Any], last: int) -> list[float | None]:
        settings = {**run.config, "train.epochs": last}
        return operations(Run(run.path, settings, run.history, [run.events[0], *starts]))

    one, two, three = operations(run)
    assert one and two and three
    assert rounds(epochs(1, 2, 2), last=2) == [one, two, 2 * three]
    assert rounds(epochs(1, 2, 2), epochs(1, 1, 1), last=1) == [one, two, three]
    assert rounds(epochs(1, 2, 1), epochs(2, 2, 1), epochs(2, 3, 2), last=3) == [one, 2 * two, 3 * three]
    within = {"checkpoint": "round-000002-partial.h5"}
    assert rounds(epochs(1, 2, 1, **within), last=2) == [one, None, 2 * three], "some clients trained less"
    assert rounds(epochs(1, 1, 1, **within), last=1) == [one, two, three]


def test_mean_cost_is_that_of_all_seeds(load: Callable[..., list[Run]]) -> None:
    """Two seeds of a fork, of which one is there with its run."""
    run, late = load("run", "late")
    other = replace(late, config={**late.config, "seed": 1}, trunk=None)
    table = comparison_report.cost(compare.compare([run, late, other]))
    assert [row[4].values[0] is None for row in table.rows] == [False, True]
    assert all(cell.values[0] for row in table.rows for cell in row[2:4])


def _tables(runs: list[Run]) -> list[Any]:
    return comparison_report.report(runs, "", None).tables


def test_table_of_forks_shows_what_restarts_changed(load: Callable[..., list[Run]]) -> None:
    """After the fork, its run went on with another learning rate and the fork with more epochs."""
    run, late = load("restarted/run", "restarted/late")
    (table,) = [table for table in _tables([run, late]) if table.name == "forks"]
    before = run.events[-2]["changes"]["train.lr"][0]
    assert [row[2].text for row in table.rows] == [
        "gate.weights sample → equal, train.epochs 1 → 2 from round 4, "
        f"run: train.lr {before} → 0.01 from round 4"
    ]
