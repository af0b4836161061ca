"""`weights fetch`: torchvision's weights as a file that a run begins with; refusals that leave no file."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.models import get_model

from support import launcher
from support.launcher import SMALL_RUN, error_message

NAME = "squeezenet1_1"  # a small one


def fetch(folder: Path, *words: str) -> launcher.Result:
    """Fetch weights with a cache in this folder and no network."""
    environment = {"TORCH_HOME": str(folder / "cache"), "https_proxy": "http://127.0.0.1:9"}
    return launcher.run_program(0, "weights", "fetch", *words, cwd=folder, env=environment)


def test_a_run_begins_with_what_was_fetched(tmp_path: Path, session: launcher.Session) -> None:
    (tmp_path / "cache" / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    published = get_model(NAME, weights=None).state_dict()
    torch.save(published, tmp_path / "cache" / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    result = fetch(tmp_path, NAME, "--out", "out")
    assert result.code == 0 and result.out.startswith("out/squeezenet1_1.pth: 1,235,496 numbers; use --model")
    words = result.out.strip().partition("; use ")[2].split()
    file = tmp_path / words[-1].rpartition("=")[2]
    assert torch.equal(torch.load(file)["classifier.1.bias"], published["classifier.1.bias"])
    flags = (*SMALL_RUN, "--data.size", "32", *words, "--dry", "true")  # the shared extractor is another one
    plan = session(*flags, cwd=tmp_path)
    assert (
        plan.code == 0 and f"weights: model {NAME} from {tmp_path}/out/{NAME}.pth, but drawn: " in plan.out
    ), plan.err


def test_refusals(tmp_path: Path, session: launcher.Session) -> None:
    (tmp_path / "alexnet.pth").touch()
    unreached = f"weights of {NAME} could not be fetched: .*refused.*\n.* a node with Internet access"
    error_message(fetch(tmp_path, NAME), unreached)
    for words, pattern in (
        ((NAME, "cnn5"), "no published weights of cnn5"),
        ((NAME, "--out", "none"), "there is no folder none"),
        ((NAME, "alexnet"), r"alexnet\.pth exists and is not overwritten"),
    ):
        error_message(session("weights", "fetch", *words, cwd=tmp_path), pattern)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["alexnet.pth"]
