"""No method waits for its device from batch to batch, or gives it a tensor of the CPU."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from pfedmoe_mpi.config import methods
from pfedmoe_mpi.conformance.checks import Case
from pfedmoe_mpi.core.batches import Normalise
from pfedmoe_mpi.core.parts import Workbench
from pfedmoe_mpi.core.turn import Engine, Turn
from pfedmoe_mpi.federation import build, evaluation
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.mpi import launch
from support.waits import META, Waits

SETTINGS = {
    "data__samples": 70, "clients": 2, "model__pool": "mlp5", "model__shared": "mlp5", "train__device": "cpu",
    "train__augment": "flip,erase,crop", "participation": 1.0,
}  # fmt: skip
OWN = {
    "fedrep": {"fedrep__head_epochs": 1},
    "fedtgp": {"fedtgp__answer": "prototype"},
    "fedjets": {"fedjets__anchors_active": 0},
}


@cache
def federation(method: str) -> Federation:
    settings = Case(method, {}).settings(**SETTINGS, **OWN.get(method, {}))
    return build.build(launch.start(), settings, warn=False)


class MetaEngine(Engine):
    def autocast(self) -> Any:  # torch has none for this device
        return nullcontext()


def waits(method: str, batch: int) -> tuple[Counter[str], Counter[str]]:
    """Return what a client step of one epoch, and a measurement, copy and wait for."""
    made = federation(method)
    normalise = Normalise((0.5,), (0.5,), 3, META)
    train = made.config.train.model_copy(update={"batch": batch})
    engine = MetaEngine(META, normalise, train, batch, 1, 4, lambda: None)
    member, state = made.clients[0], made.method.state()
    splits = {name: split.to(META) for name, split in member.splits.items()}
    bench = Workbench(1, META)
    with Waits():
        parts = bench.parts((state, bench.initial(state)), (member.spec, member.vector))
    turn = Turn(
        engine, made.method.loss, replace(member, splits=splits), parts, 2, made.method.cohort(2)[0][1]
    )
    with Waits() as step:
        made.method.client_step(turn)
    with Waits() as measured:
        evaluation.measure(engine, made.method, parts, splits["train"])
    return step.found, measured.found


@pytest.mark.parametrize("method", methods.names())
def test_more_batches_wait_no_more_often(method: str) -> None:
    step, measured = waits(method, 12)
    assert waits(method, 6) == (step, measured)
    epochs = 2 if method == "fedrep" else 1
    assert step["copy to meta"] >= epochs, "an epoch's random numbers go to the device in one copy"
    per_client = 14 if method == "fedkd" else 5  # fedkd factors the update on the CPU, matrix by matrix
    assert step.total() - 2 * epochs <= per_client, step
    assert measured.total() <= 4, measured
