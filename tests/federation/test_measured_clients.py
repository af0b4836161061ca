"""`eval.clients`: a part of the clients is measured, drawn anew in every round."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pfedmoe_mpi import config
from pfedmoe_mpi.federation.evaluation import drawn_clients
from support.launcher import Result, read_metrics

SETTINGS = {"clients": 40, "rounds": 9, "eval.every": 3, "eval.clients": 0.1}


def test_draws_are_addressed_and_hold_the_cohort() -> None:
    settings = config.build(SETTINGS)
    drawn = [drawn_clients(settings, round, [7, 39]).tolist() for round in range(1, 10)]
    assert [len(clients) for clients in drawn[:3]] == [0, 0, len(drawn[5])] and drawn[8] == list(range(40))
    assert drawn[2] != drawn[5] and {7, 39} <= {*drawn[2]} & {*drawn[5]} and drawn[2] == sorted(drawn[2])
    assert 4 <= len(drawn[2]) <= 6, "a tenth of 40 clients, and two of the cohort"
    part = config.build({**SETTINGS, "eval.last": "drawn", "eval.clients": 5})
    assert 5 <= len(drawn_clients(part, 9, [7])) <= 6
    assert np.array_equal(drawn_clients(settings, 3, [7]), drawn_clients(settings, 3, [7]))


def test_means_are_over_the_measured_clients(run_command: Callable[..., Result], tmp_path: Path) -> None:
    few = ("--clients", "48", "--participation", "0.04", "--rounds", "3", "--eval.clients", "6")
    data = ("--data.source", "synthetic", "--data.samples", "960", "--data.size", "8", "--run.dir", "run")
    kind = ("--algorithm", "fedavg", "--partition.kind", "iid", "--model.pool", "mlp5")
    said = run_command(*few, *data, *kind, "--eval.last", "drawn").out
    rows = read_metrics(tmp_path / "run")
    measured = [{k for k, a in enumerate(row["clients"]["accuracy"]) if a is not None} for row in rows]
    for row, clients in zip(rows, measured, strict=True):
        assert {*row["cohort"]} <= clients and 6 <= len(clients) <= 8
        accuracy = [a for a in row["clients"]["accuracy"] if a is not None]
        assert row["accuracy"]["mean"] == pytest.approx(np.mean(accuracy))
        assert row["accuracy"]["worst"] == min(accuracy) and row["accuracy_cohort"]["mean"] is not None
    assert len({*map(frozenset, measured)}) > 1
    assert len(re.findall(r"^│ +\d+ │ +mlp5 │", said, re.MULTILINE)) == 3, "worst, median, best of the 48"
    run_command("report", "run", "--text", "true", "--models", "false")


@pytest.mark.parametrize(
    ("given", "said"),
    [("0.01", "less than half a client"), ("2.5", "whole number"), ("40", "there are 4 clients")],
)
def test_impossible_parts_are_refused(assert_refused: Callable[..., str], given: str, said: str) -> None:
    flags = ("--clients", "4", "--dry", "true", "--eval.clients", given)
    assert "--eval.clients" in assert_refused(said, *flags)
