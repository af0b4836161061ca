"""Frozen networks of timm and torchvision, from files, keep this program's promises."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from pfedmoe_mpi import load_client
from pfedmoe_mpi.checkpoint import Checkpoint
from support import launcher
from support.launcher import SMALL_RUN, checkpoint_digest, read_metrics

timm = pytest.importorskip("timm")
FILES = "resnet18=resnet.pth,timm:vit_tiny_patch16_224=vit.pth"
FLAGS = (
    *(
        *SMALL_RUN,
        "--data.samples",
        "80",
        "--data.size",
        "32",
        "--algorithm",
        "standalone",
        "--model.dim",
        "12",
        "--rounds",
        "2",
    ),
    *("--model.pool", "resnet18,timm:vit_tiny_patch16_224", "--model.stem", "imagenet"),
    *("--model.train", "head", "--model.weights", FILES, "--run.checkpoint_every", "1"),
)


def test_from_start_to_load_client(tmp_path: Path, session: launcher.Session) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(5)
    torch.save(resnet18().state_dict(), tmp_path / "resnet.pth")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    done = session(*FLAGS, "--run.dir", "one", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "; outputs, 512 numbers a sample" in done.out and "; outputs, 192 numbers a sample" in done.out
    for words in ((*FLAGS, "--rounds", "1", "--run.dir", "two"), ("restart", "two", "--rounds", "2")):
        again = session(*words, cwd=tmp_path)
        assert again.code == 0, again.err
    assert checkpoint_digest(tmp_path / "two", 2) == checkpoint_digest(tmp_path / "one", 2)
    newest = tmp_path / "two" / "checkpoints" / "round-000002.h5"
    assert session("data", "prepare", *FLAGS, "x.h5", cwd=tmp_path).code == 0
    with Checkpoint(newest) as loaded, h5py.File(tmp_path / "x.h5") as data:
        for client in (0, 1):
            rows = np.sort(loaded.partition("test")[client])
            x, y = data["x"][rows], torch.from_numpy(data["y"][rows].astype(np.int64))
            accuracy = read_metrics(tmp_path / "two")[-1]["clients"]["accuracy"][client]
            predicted = load_client(newest, client).predict(x).argmax(1)
            assert float((predicted == y).double().mean()) == pytest.approx(accuracy)
