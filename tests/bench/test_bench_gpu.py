"""`bench gpu`: every line is measured, here on a CPU, which has no graphs; on a CPU the command refuses."""

from __future__ import annotations

from pathlib import Path

import torch

from pfedmoe_mpi import config
from pfedmoe_mpi.bench.gpu import PAPER, Limits, Measurement, measure_limits, operations
from pfedmoe_mpi.federation.build import build
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.mpi.comm import Comm
from support.launcher import Session, error_message
from support.small_federation import shared_comm

SETTINGS = {
    "data.source": "synthetic", "data.samples": 1200, "data.size": 8, "clients": 4, "partition.kind": "iid",
    "model.pool": "mlp5", "model.shared": "mlp5", "train.batch": 32, "train.device": "cpu", "rounds": 1000,
}  # fmt: skip


def test_without_a_gpu_it_is_refused(session: Session, tmp_path: Path) -> None:
    said = error_message(
        session("bench", "gpu", "--train.device", "cpu", cwd=tmp_path), "bench gpu measures GPUs"
    )
    assert "rank 0 trains on a CPU" in said


def test_every_line_is_measured() -> None:
    built: list[config.Config] = []

    def make(comm: Comm, settings: config.Config) -> Loop:
        built.append(settings)
        loop = Loop(comm, build(comm, settings, warn=False), SilentObserver(), None)
        assert loop.begin()
        return loop

    lines = Measurement(shared_comm(), config.build(SETTINGS), make, 1, 64, 4096).lines()
    found = {line.what: line for line in lines}
    for precision in ("fp32", "bf16"):
        step = found[f"a client's training vs its kernels, {precision}, B = 32, graphs off"]
        assert step.ratio and step.aim == 1.5
        assert (found[f"  its kernels vs the limits, {precision}"].ratio or 0) > 0
    assert {
        "clients per second, 1 rank(s), graphs off",
        "clients per second, 1 rank(s), graphs on",
    } <= found.keys()
    assert found["  500 of them, over ten minutes"].aim == 1.0
    assert config.flatten(config.to_tree(built[-1])).items() >= PAPER.items()


def test_operations_and_limits() -> None:
    a = torch.ones(4, 5)
    assert operations(lambda: a @ torch.ones(5, 6)) == 2 * 4 * 5 * 6
    limits = Limits(fp32=100.0, bf16=400.0, bytes=10.0)
    assert limits.seconds(1000, 20, "fp32") == 10 and limits.seconds(1000, 20, "bf16") == 2.5
    assert limits.seconds(100, 20, "bf16") == 2, "bytes bound it"
    here = measure_limits(torch.device("cpu"), 32, 1024, 1)
    assert min(here.fp32, here.bf16, here.bytes) > 0
