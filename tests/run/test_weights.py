"""Runs that begin with files of weights keep this program's promises, from start to `load_client`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pfedmoe_mpi import load_client
from pfedmoe_mpi.models import registry
from support import launcher
from support.launcher import SMALL_RUN, checkpoint_digest, error_message, run_to_end
from support.mpi_job import run_module
from support.paths import ROOT

NETS = ROOT / "tests" / "strangers" / "nets.py"
FLAGS = (
    *(*SMALL_RUN, "--model.pool", f"{NETS}:small_resnet,mlp5", "--model.shared", "mlp5", "--model.dim", "12"),
    *("--model.weights", "small_resnet=a.pt,mlp5=b.pt", "--rounds", "2"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished run on one rank, and the files that it began with."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(5)
    for name, architecture in (("a", f"{NETS}:small_resnet"), ("b", "mlp5")):
        model = registry.build_model(architecture, (3, 8, 8), 10, 12, "small")
        torch.save(model.state_dict(), folder / f"{name}.pt")
    run_to_end(1, *FLAGS, "--run.dir", "run", cwd=folder)
    return folder


def test_same_bits_on_three_ranks_and_without_the_files(folder: Path, tmp_path: Path) -> None:
    expected = checkpoint_digest(folder / "run", 2)
    for name in ("a.pt", "b.pt"):
        shutil.copy(folder / name, tmp_path)
    files = ("--model.weights", f"small_resnet={tmp_path}/a.pt,mlp5={tmp_path}/b.pt")
    words = ("stop", "1", "training", *FLAGS, *files, "--run.dir", str(tmp_path / "run"))
    ended = run_module("fault_injection", *words, ranks=3)
    assert ended.code == 75, ended.output
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).unlink()
    run_to_end(2, "restart", "run", cwd=tmp_path)
    assert checkpoint_digest(tmp_path / "run", 2) == expected
    event = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1])
    assert event["event"] == "finish"


def test_identity_export_and_evaluation(folder: Path, tmp_path: Path, session: launcher.Session) -> None:
    newest = str(folder / "run" / "checkpoints" / "round-000002.h5")
    printed = session("inspect", newest, cwd=tmp_path).out
    digests = json.loads(printed.partition("\nweights: ")[2].partition("\n")[0])
    assert set(digests) == {"nets.small_resnet", "mlp5"} and all(len(one) == 64 for one in digests.values())
    assert session("evaluate", newest, cwd=tmp_path).code == 0, "the files are not needed"
    assert session("export", newest, "one.h5", "--client", "0", cwd=tmp_path).code == 0
    assert load_client(tmp_path / "one.h5").client == 0
    words = (*SMALL_RUN, "--algorithm", "standalone", "--model.dim", "12", "--run.dir", "again")
    pool = ("--model.pool", f"{NETS}:small_resnet", "--model.weights", "one.h5")
    again = session(*words, *pool, cwd=tmp_path)
    assert again.code == 0 and "small_resnet from " in again.out and "drawn" not in again.out, again.err


def test_a_missing_file_is_refused_before_anything_is_written(
    tmp_path: Path, session: launcher.Session
) -> None:
    message = error_message(session(*FLAGS, "--run.dir", "run", cwd=tmp_path), "there is no file")
    assert str(tmp_path / "a.pt") in message and not (tmp_path / "run").exists()
