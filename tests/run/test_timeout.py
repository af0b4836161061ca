"""The time-out of one run does not last into the next run of the same process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pfedmoe_mpi import config
from pfedmoe_mpi.mpi import comm, launch
from pfedmoe_mpi.reproduce import command
from pfedmoe_mpi.run import job
from support.launcher import SMALL_RUN

SMALL = dict(zip((word.removeprefix("--") for word in SMALL_RUN[::2]), SMALL_RUN[1::2], strict=True))


def test_each_run_has_its_own_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, seen = launch.start(), []
    monkeypatch.setattr(job, "_train_rounds", lambda world, *_: seen.append(world.timeout) or 0)
    for number, timeout in enumerate((5.0, 0.0, 7.0)):
        settings = config.build({**SMALL, "run.timeout": timeout, "run.dir": str(tmp_path / str(number))})
        job.begin(world, settings, "", None)
    assert seen == [5.0, comm.TIMEOUT, 7.0]


def test_work_between_runs_has_the_default_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, seen = launch.start(), []

    def train(world: comm.Comm, *_: Any) -> int:
        seen.append(world.timeout)
        world.timeout = 5.0
        return 0

    monkeypatch.setattr(job, "begin", train)
    run: Any = SimpleNamespace(config=config.build({}))
    for number in range(2):
        command._train_run(world, run, tmp_path / str(number), {}, "", None)
    assert seen == [comm.TIMEOUT, comm.TIMEOUT]
