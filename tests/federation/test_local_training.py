"""Settings of the clients' training in a federation: who refuses them, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfedmoe_mpi import config
from pfedmoe_mpi.algorithms.base import Task
from pfedmoe_mpi.federation.costs import client_costs
from pfedmoe_mpi.report.costs import OPERATIONS, operations
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.reproduce.estimate import Pace, Size, _cost


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("scaffold --train.optimiser adam", "train.optimiser = adam, but scaffold .* is right for SGD only"),
        ("fd --train.steps 2", "train.steps = 2, but fd .* an epoch of its largest client has [3-9] updates"),
        ("fd --train.steps 1 --train.accumulate 2", "largest client has 2 updates"),
    ],
)
def test_method_refuses_what_breaks_it(
    assert_refused: Callable[..., str], small_run: tuple[str, ...], flags: str, reason: str
) -> None:
    pool = ("--model.pool", "mlp5", "--run.dir", "run")
    assert_refused(reason, *small_run, *pool, "--algorithm", *flags.split())


def test_fd_takes_as_many_steps_as_an_epoch(
    run_command: Callable[..., Any], small_run: tuple[str, ...]
) -> None:
    flags = ("--algorithm", "fd", "--train.steps", "9", "--dry", "true")
    assert "fd on" in run_command(*small_run, *flags).out


COUNTS = np.array(
    [[10, 10], [50, 47], [0, 33]]
)  # 20, 97 and 33 samples: with B = 16 two, six and two batches


def test_costs_count_the_samples_of_the_steps() -> None:
    """The same steps cost clients about the same, whatever they have; an epoch costs what they have."""

    def costs(**train: Any) -> np.ndarray:
        flat = {"clients": 3, "model.pool": "mlp5", **{f"train.{name}": n for name, n in train.items()}}
        return np.array(client_costs(Task(config.build(flat), (4,), 2, COUNTS, ("mlp5",), "mlp5", 4)))

    by_epochs = costs()
    assert (by_epochs / by_epochs[0]).tolist() == pytest.approx([1, 97 / 20, 33 / 20])
    assert (costs(epochs=5) == by_epochs).all()
    assert (costs(steps=6) / by_epochs).tolist() == pytest.approx([3, 1, 3])
    assert (costs(steps=6, accumulate=2) / by_epochs).tolist() == pytest.approx([6, 2, 6])


def test_reports_count_the_operations_of_the_steps() -> None:
    row: dict[str, Any] = {
        "round": 1,
        "cohort": [0, 2],
        "clients": {"samples": [20, 97, 33], "accuracy": [0.5] * 3},
    }
    row["accuracy"] = {"mean": 0.5}
    start = {"event": "start", "multiply_adds": [10.0, 20.0, 30.0]}

    def counted(**train: int) -> float:
        settings = {"train.batch": 16, **{f"train.{name}": number for name, number in train.items()}}
        (found,) = operations(Run(Path(), settings, [row], [start]))
        return (found or 0.0) / OPERATIONS

    assert counted() == 10 * 20 + 30 * 33, "a run of an earlier version"
    assert counted(epochs=3, steps=0) == 3 * (10 * 20 + 30 * 33)
    assert counted(epochs=3, steps=5) == 10 * (2 * 20 + 16) + 30 * (2 * 33 + 16), "two epochs and a batch"


def test_estimates_count_the_samples_of_the_steps() -> None:
    def estimate(**train: int) -> tuple[float, float]:
        flat = {"rounds": 10, "clients": 2, **{f"train.{name}": number for name, number in train.items()}}
        run = Size([20, 97], [0, 0], 2, (4,), 2, "float32", 0, flat)
        cost = _cost(run, [Pace(0.0, 0.0, 1.0, 0.0)], 0.0, 1)
        return cost.samples, cost.seconds

    assert estimate(epochs=2) == pytest.approx((10 * 2 * 117, 10 * 2 * 117))
    assert estimate(steps=6) == pytest.approx((10 * (60 + 97), 10 * (60 + 97)))
