"""The program on a GPU: `pytest -m gpu` where one is visible; within four minutes on one H100.

Bits are compared between runs on the GPU. A CPU rounds differently: its loss after a round may differ by a
thousandth.
"""

from __future__ import annotations

import os
import signal
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pfedmoe_mpi.config import methods
from pfedmoe_mpi.conformance.checks import Case, digest
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation import build, gpu_memory
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.mpi import comm, launch
from support import launcher
from support.launcher import checkpoint_digest, rank_processes, run_to_end, running_job, wait_for_file
from support.text_files import write_hospitals, write_news

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible"),
]

CNN = ("--rounds", "3", "--run.checkpoint_every", "1", "--train.device", DEVICE, "--clients", "6")
IMAGES = {
    "data__size": 16, "data__samples": 400, "clients": 4, "model__pool": "cnn5", "model__shared": "cnn5",
    "train__augment": "flip,erase,crop", "rounds": 1,
}  # fmt: skip
METHODS = tuple(methods.names())
FAMILIES = {  # the side of its images, and whether torchvision has it
    "cnn5": (32, False), "mlp5": (8, False), "mnist5": (16, False), "resnet18": (32, True),
    "alexnet": (64, True), "vgg11": (32, True), "mobilenet_v3_small": (32, True), "swin_t": (32, True),
}  # fmt: skip


@cache
def shared_comm() -> comm.Comm:
    return launch.start()


def made(method: str, **changes: Any) -> Federation:
    settings = Case(method, {}).settings(**{"train__device": DEVICE, **changes})
    return build.build(shared_comm(), settings, warn=False)


def trained(method: str, **changes: Any) -> Loop:
    """Return a federation after its rounds."""
    loop = Loop(shared_comm(), made(method, **changes), SilentObserver(), None)
    assert loop.run()
    return loop


# In this process


@pytest.mark.parametrize("method", METHODS)
def test_every_method_repeats_its_bits_and_agrees_with_a_cpu(method: str) -> None:
    first, second = (trained(method, **IMAGES) for _ in range(2))
    assert digest(first) == digest(second)
    on_cpu = trained(method, **IMAGES, train__device="cpu")
    for name in ("train_loss", "loss"):
        expected, found = on_cpu.history[0].get(name), first.history[0].get(name)
        assert expected is None or found == pytest.approx(expected, rel=1e-3), name


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_every_family_repeats_its_bits(name: str) -> None:
    side, from_torchvision = FAMILIES[name]
    if from_torchvision:
        pytest.importorskip("torchvision")
    changes = {"data__size": side, "data__samples": 80, "clients": 2, "rounds": 1}
    first, second = (digest(trained("fedavg", model__pool=name, **changes)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", ["fasttext", "lstm", "gru", "transformer"])
def test_texts(tmp_path: Path, name: str) -> None:
    data = {"data__source": "text", "data__path": str(write_news(tmp_path / "news.csv")), "data__size": 0}
    changes = {
        "clients": 3,
        "rounds": 1,
        "model__pool": name,
        "model__shared": name,
        "partition__kind": "iid",
    }
    first, second = (digest(trained("pfedmoe", **data, **changes)) for _ in range(2))
    assert first == second


def test_tables(tmp_path: Path) -> None:
    data = {"data__source": "heart", "data__path": str(write_hospitals(tmp_path / "heart")), "data__size": 0}
    first, second = (
        digest(trained("pfedmoe", **data, clients=3, rounds=1, partition__kind="natural")) for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("method", METHODS)
def test_more_batches_wait_no_more_often(method: str) -> None:
    """torch itself names the waits; tests/algorithms/test_waits.py counts them without a GPU."""
    federation = made(method, **IMAGES)
    number, role = federation.method.cohort(1)[0]
    client, state = federation.clients[number], federation.workbench.initial(federation.method.state())
    found = []
    for batch in (16, 32, 16, 8):  # the first run chooses kernels
        train = federation.engine.train.model_copy(update={"batch": batch})
        parts = federation.parts(client, state)
        turn = Turn(replace(federation.engine, train=train), federation.method.loss, client, parts, 1, role)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                federation.method.client_step(turn)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append(sum("synchroniz" in str(each.message) for each in said))
    assert found[1] == found[2] == found[3] > 0


def test_samples_in_host_memory_give_the_same_bits() -> None:
    changes = {**IMAGES, "rounds": 2, "stream__kind": "abrupt", "stream__round": 2}
    streamed, resident = (trained("pfedmoe", train__samples_in=where, **changes) for where in ("host", "gpu"))
    assert digest(streamed) == digest(resident)
    splits = [split for client in streamed.federation.clients.values() for split in client.splits.values()]
    assert all(split.x.is_pinned() and split.y.is_cuda for split in splits if len(split))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["pfedmoe", "fedkd", "scaffold"])
def test_graphs_agree_with_steps_computed_anew(
    method: str, precision: str, record_property: pytest.RecordProperty
) -> None:
    changes = {**IMAGES, "train__precision": precision, "rounds": 2, "train__epochs": 3, "train__batch": 8}
    with_graphs, without = (trained(method, train__graphs=graphs, **changes) for graphs in ("on", "off"))
    graphs = with_graphs.federation.engine.graphs
    assert graphs and graphs.captured > 0, "no step was captured"
    tolerance = 1e-2 if precision == "bf16" else 1e-4
    assert torch.allclose(with_graphs.state, without.state, rtol=tolerance, atol=tolerance)
    record_property("equal bits", digest(with_graphs) == digest(without))


def test_memory_is_flat_over_fifty_rounds() -> None:
    loop = Loop(shared_comm(), made("pfedmoe", **{**IMAGES, "rounds": 50}), SilentObserver(), None)
    assert loop.begin()
    used = []
    for _ in range(50):
        assert loop.run_round()
        used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert used[-1] == used[9]


@pytest.mark.parametrize("name", ["cnn5", "resnet18"])
def test_the_estimate_bounds_the_memory_that_is_used(name: str) -> None:
    if name == "resnet18":
        pytest.importorskip("torchvision")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    changes = {**IMAGES, "data__size": 32, "data__samples": 800, "train__batch": 128, "clients": 2}
    federation = trained("fedavg", **{**changes, "model__pool": name, "model__shared": name}).federation
    peak = torch.cuda.max_memory_allocated() - before
    rows = sum(len(split) for client in federation.clients.values() for split in client.splits.values())
    need = gpu_memory.estimate(federation.task, federation.method, rows, 3 * 32 * 32 + 8)
    assert need.models < peak < need.total


def test_clients_pass_through_few_pinned_buffers() -> None:
    built = made("pfedmoe")
    assert len(built.staging.buffers) == 2 and all(one.is_pinned() for one in built.staging.buffers)
    state = built.workbench.initial(built.method.state())
    for client in built.clients.values():
        parts = built.parts(client, state)
        read = built.workbench.read(client.spec, parts, torch.empty_like(client.vector))
        assert torch.equal(read, client.vector)
    assert all(split.x.is_cuda for client in built.clients.values() for split in client.splits.values())


def test_an_operation_without_a_deterministic_kernel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self, shape, dim):\n        super().__init__()\n"
        "        self.first = nn.Conv2d(shape[0], 4, 3)\n        self.last = nn.Linear(4 * 81, dim)\n\n"
        "    def forward(self, x):\n"
        "        x = nn.functional.interpolate(self.first(x), (9, 9), mode='bilinear')\n"
        "        return self.last(x.flatten(1))\n"
    )
    model = f"{tmp_path / 'nets.py'}:Net"
    changes = {"model__pool": model, "model__shared": model, "rounds": 1}
    with pytest.raises(ConfigError, match=r"train.deterministic = true, but upsample_bilinear2d"):
        made("fedavg", **changes)
    assert trained("fedavg", train__deterministic=False, **changes).history


# Under mpirun


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ranks_sharing_a_gpu_and_a_restart_give_the_same_bits(tmp_path: Path, precision: str) -> None:
    arguments = (*CNN, "--train.precision", precision)
    found = set()
    for ranks in (1, 2, 4) if precision == "fp32" else (2,):
        output = run_to_end(ranks, *arguments, "--run.dir", str(ranks), cwd=tmp_path, own_job=True)
        assert "GPU 0 of" in output
        found.add(checkpoint_digest(tmp_path / str(ranks), 3))
    run_to_end(1, *arguments, "--rounds", "1", "--run.dir", "run", cwd=tmp_path, own_job=True)
    run_to_end(2, "restart", "run", "--rounds", "3", cwd=tmp_path, own_job=True)
    found.add(checkpoint_digest(tmp_path / "run", 3))
    assert len(found) == 1


def test_a_stop_in_the_middle_of_a_round_keeps_the_bits(tmp_path: Path) -> None:
    arguments = (*CNN, "--train.epochs", "60", "--rounds", "1")
    with running_job(2, *arguments, "--run.dir", "run", cwd=tmp_path) as job:
        wait_for_file(tmp_path / "run" / "events.jsonl", job)
        os.kill(rank_processes(job.pid)[1], signal.SIGUSR1)
        assert launcher.wait_for_end(job, 60).code == 75
    run_to_end(1, "restart", "run", cwd=tmp_path, own_job=True)
    run_to_end(2, *arguments, "--run.dir", "whole", cwd=tmp_path, own_job=True)
    assert checkpoint_digest(tmp_path / "run", 1) == checkpoint_digest(tmp_path / "whole", 1)
