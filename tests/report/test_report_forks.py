"""Forks and changed restarts in reports: what their rounds took."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pfedmoe_mpi.report.costs import operations, reached, total
from pfedmoe_mpi.report.load import Run, load_run
from pfedmoe_mpi.report.periods import periods, with_trunks
from support.launcher import SMALL_RUN, Session

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
    (unlike,) = load("seed1")
    unlike = replace(unlike, path=folder / "run")
    assert operations(with_trunks([late, unlike])[0])[0] is None, "other rounds than the fork's"
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
