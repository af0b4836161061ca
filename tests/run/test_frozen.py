"""Runs with frozen tensors keep this program's promises, from start to `load_client` and `export`."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from pfedmoe_mpi import load_client
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.models import registry
from support import launcher
from support.launcher import SMALL_RUN, checkpoint_digest, error_message, read_metrics, run_to_end
from support.mpi_job import run_module
from support.paths import ROOT

NETS = ROOT / "tests" / "strangers" / "nets.py"
FLAGS = (
    *(*SMALL_RUN, "--model.pool", f"{NETS}:small_resnet,{NETS}:TinyViT", "--model.dim", "12"),
    *("--model.shared", f"{NETS}:TinyViT", "--model.train", "head", "--rounds", "2"),
    *("--run.checkpoint_every", "1"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished run on one rank, and the file that its ResNets began with."""
    folder = tmp_path_factory.mktemp("frozen")
    torch.manual_seed(5)
    model = registry.build_model(f"{NETS}:small_resnet", (3, 8, 8), 10, 12, "small")
    for name, tensor in model.named_buffers():
        if name.endswith("running_mean"):
            tensor += 1
    torch.save(model.state_dict(), folder / "resnet.pt")
    run_to_end(1, *flags(folder), "--run.dir", "run", cwd=folder)
    return folder


def flags(folder: Path) -> tuple[str, ...]:
    return (*FLAGS, "--model.weights", f"small_resnet={folder}/resnet.pt")


def newest(run: Path) -> Path:
    return run / "checkpoints" / "round-000002.h5"


def frozen_file(run: Path) -> Path:
    (path,) = (run / "frozen").iterdir()
    return path


def test_same_bits_on_three_ranks_and_after_a_stop_without_the_file(folder: Path, tmp_path: Path) -> None:
    expected = checkpoint_digest(folder / "run", 2)
    shutil.copy(folder / "resnet.pt", tmp_path)
    words = ("stop", "1", "training", *flags(tmp_path), "--run.dir", str(tmp_path / "run"))
    ended = run_module("fault_injection", *words, ranks=3)
    assert ended.code == 75, ended.output
    (tmp_path / "resnet.pt").unlink()
    run_to_end(2, "restart", "run", cwd=tmp_path)
    assert checkpoint_digest(tmp_path / "run", 2) == expected
    assert frozen_file(tmp_path / "run").name == frozen_file(folder / "run").name


def test_frozen_tensors_are_stored_once(folder: Path) -> None:
    saved = torch.load(folder / "resnet.pt")
    with h5py.File(newest(folder / "run")) as checkpoint, h5py.File(frozen_file(folder / "run")) as file:
        layouts = [dataset[()].tobytes().decode() for dataset in checkpoint["layouts"].values()]
        assert any('"model/extractor.6.weight"' in text for text in layouts)
        for name in ("extractor.0.weight", "extractor.1.inner.0.running_mean"):
            assert not any(name in text for text in layouts)
            np.testing.assert_array_equal(file["model nets.small_resnet"][name][()], saved[name].numpy())
        assert {"extractor nets.TinyViT", "model nets.TinyViT", "model nets.small_resnet"} < set(file)


def test_plan_and_report_say_what_is_frozen(folder: Path, tmp_path: Path, session: launcher.Session) -> None:
    plan = session(*flags(folder), "--dry", "true", cwd=tmp_path).out
    assert (
        "shared:  shared: 2 tensors, 204 parameters" in plan and "frozen:  extractor nets.TinyViT: " in plan
    )
    outputs = " numbers a sample, computed once per client"
    assert f"; outputs, 16{outputs}\n" in plan and f"; outputs, 8{outputs}\n" in plan
    for kind in ("extractor nets.TinyViT", "model nets.TinyViT"):
        assert f"weights: {kind} as it is built, from no file; what model.train = head freezes" in plan
    assert f"weights: model nets.small_resnet from {folder}/resnet.pt" in plan
    again = session(*flags(folder), "--dry", "true", "--model.keep_outputs", "false", cwd=tmp_path).out
    assert "frozen:  extractor" in again and outputs not in again
    text = session("report", str(folder / "run"), "--text", "true", cwd=tmp_path).out
    assert "204 of the server" in text and "frozen, once on every rank: extractor nets.TinyViT " in text


def test_loaded_and_exported_clients_are_complete(
    folder: Path, tmp_path: Path, session: launcher.Session
) -> None:
    run = folder / "run"
    assert session("data", "prepare", *flags(folder), "x.h5", cwd=tmp_path).code == 0
    from pfedmoe_mpi.checkpoint import Checkpoint

    for client in (0, 1):
        exported = f"{client}.h5"
        words = ("export", str(newest(run)), exported, "--client", str(client))
        assert session(*words, cwd=tmp_path).code == 0
        models = [load_client(newest(run), client), load_client(tmp_path / exported)]
        with Checkpoint(newest(run)) as loaded, h5py.File(tmp_path / "x.h5") as data:
            rows = np.sort(loaded.partition("test")[client])
            x, y = data["x"][rows], torch.from_numpy(data["y"][rows].astype(np.int64))
        accuracy = read_metrics(run)[-1]["clients"]["accuracy"][client]
        logits = [model.predict(x) for model in models]
        assert torch.equal(*logits)
        assert float((logits[0].argmax(1) == y).double().mean()) == pytest.approx(accuracy)
    # Both are complete as files of weights, too: the server's part of the checkpoint, and a client's.
    for file, name, drawn in (
        (newest(run), "TinyViT", ", but drawn: head.weight, head.bias"),
        (tmp_path / "0.h5", "small_resnet", ""),
    ):
        words = (*SMALL_RUN, "--algorithm", "standalone", "--model.dim", "12", "--dry", "true")
        pool = ("--model.pool", f"{NETS}:{name}", "--model.weights", str(file))
        assert f"weights: model nets.{name} from {file}{drawn}\n" in session(*words, *pool, cwd=tmp_path).out
    with h5py.File(tmp_path / "0.h5") as file:
        assert "model nets.TinyViT" not in file and "extractor.0.weight" in file["model"]


def test_missing_or_damaged_frozen_tensors(folder: Path, tmp_path: Path, session: launcher.Session) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    path = frozen_file(tmp_path / "run")
    kept = path.read_bytes()
    assert session("evaluate", str(newest(tmp_path / "run")), cwd=tmp_path).code == 0
    with h5py.File(path, "r+") as file:
        file["model nets.TinyViT/extractor.patches.weight"][0] += 1
    for pattern, remedy in (("is damaged: its digest is", "again"), ("needs its frozen tensors", "beside")):
        for words in (("restart", "run", "--rounds", "3"), ("evaluate", str(newest(tmp_path / "run")))):
            assert remedy in error_message(session(*words, cwd=tmp_path), pattern)
        with pytest.raises(CheckpointError, match=pattern):
            load_client(newest(tmp_path / "run"), 0)
        path.unlink(missing_ok=True)
    path.write_bytes(kept)
    (tmp_path / "link.h5").symlink_to(newest(tmp_path / "run"))
    assert load_client(tmp_path / "link.h5", 0).client == 0
    # A checkpoint that was moved takes them from beside it.
    (tmp_path / "moved" / "frozen").mkdir(parents=True)
    shutil.copy(newest(tmp_path / "run"), tmp_path / "moved")
    (tmp_path / "moved" / "frozen" / path.name).write_bytes(kept)
    assert load_client(tmp_path / "moved" / "round-000002.h5", 0).client == 0


def test_low_rank_changes_of_a_transformer(tmp_path: Path, session: launcher.Session) -> None:
    vit = ("--model.pool", f"{NETS}:TinyViT", "--model.train", "lora", "--model.lora_rank", "2")
    run_to_end(1, *FLAGS, *vit, "--run.dir", "one", cwd=tmp_path)
    run_to_end(3, *FLAGS, *vit, "--rounds", "1", "--run.dir", "three", cwd=tmp_path)
    run_to_end(2, "restart", "three", "--rounds", "2", cwd=tmp_path)
    assert checkpoint_digest(tmp_path / "three", 2) == checkpoint_digest(tmp_path / "one", 2)
    from pfedmoe_mpi.checkpoint import Checkpoint

    with Checkpoint(newest(tmp_path / "one")) as loaded:
        names = [entry.name for entry in loaded.state_layout.entries]
        assert "shared/blocks.layers.0.self_attn.parametrizations.in_proj_weight.0.b" in names
        state = loaded.state_layout.views(torch.from_numpy(loaded.state))
        assert all(bool(tensor.any()) for tensor in state.values()), "every B was trained"
    assert load_client(newest(tmp_path / "one"), 1).client == 1
    words = (*FLAGS, "--model.pool", f"{NETS}:small_resnet", "--model.train", "lora", "--run.dir", "no")
    error_message(session(*words, cwd=tmp_path), "needs linear layers besides the last one, and ")


def test_a_pattern_that_selects_nothing_is_refused(tmp_path: Path, session: launcher.Session) -> None:
    words = (*SMALL_RUN, "--model.train", "layer9.*", "--run.dir", "run")
    message = error_message(
        session(*words, cwd=tmp_path), r"model\.train = layer9\.\* selects no tensor of mlp5"
    )
    assert "fc1.weight" in message and not (tmp_path / "run").exists()
