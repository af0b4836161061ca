"""The same code on CUDA. Run where a GPU is visible: `pytest -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from support.launcher import QUICK_RUN, run_to_end
from support.launcher import checkpoint_digest as digest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible"),
]

CNN = ("--rounds", "3", "--run.checkpoint_every", "1", "--train.device", "cuda", "--clients", "6")


def last(folder: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_ranks_sharing_a_gpu_give_the_same_bits(tmp_path: Path) -> None:
    found = set()
    for ranks in (1, 2, 4):
        output = run_to_end(ranks, *CNN, "--run.dir", str(ranks), cwd=tmp_path)
        assert "GPU 0 of" in output
        found.add(digest(tmp_path / str(ranks), 3))
    assert len(found) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_restart_on_a_gpu_gives_the_same_bits(tmp_path: Path, precision: str) -> None:
    arguments = (*CNN, "--train.precision", precision)
    run_to_end(2, *arguments, "--run.dir", "whole", cwd=tmp_path)
    run_to_end(1, *arguments, "--rounds", "1", "--run.dir", "run", cwd=tmp_path)
    run_to_end(2, "restart", "run", "--rounds", "3", cwd=tmp_path)
    assert digest(tmp_path / "run", 3) == digest(tmp_path / "whole", 3)


def test_gpu_and_cpu_losses_agree(tmp_path: Path) -> None:
    run_to_end(1, *CNN, "--run.dir", "gpu", cwd=tmp_path)
    run_to_end(1, *CNN, "--train.device", "cpu", "--run.dir", "cpu", cwd=tmp_path)
    gpu, cpu = last(tmp_path / "gpu"), last(tmp_path / "cpu")
    assert gpu["train_loss"] == pytest.approx(cpu["train_loss"], rel=1e-3)


@pytest.mark.parametrize("method", ["standalone", "fedavg", "fedproto", "scaffold"])
def test_every_method_runs_on_a_gpu(tmp_path: Path, method: str) -> None:
    run_to_end(2, *QUICK_RUN, "--train.device", "cuda", "--algorithm", method, cwd=tmp_path)


def test_clients_pass_through_few_pinned_buffers() -> None:
    from pfedmoe_mpi.conformance.checks import Case
    from pfedmoe_mpi.federation import build
    from pfedmoe_mpi.mpi import comm

    built = build.build(comm.start(), Case("pfedmoe", {}).settings(train__device="cuda"))
    assert len(built.staging.buffers) == 2 and all(one.is_pinned() for one in built.staging.buffers)
    state = built.workbench.initial(built.method.state())
    for client in built.clients.values():
        parts = built.parts(client, state)
        read = built.workbench.read(client.spec, parts, torch.empty_like(client.vector))
        assert torch.equal(read, client.vector)
    assert all(split.x.is_cuda for client in built.clients.values() for split in client.splits.values())
