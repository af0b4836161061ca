"""A client's model in a notebook: it predicts as the run measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from pfedmoe_mpi import checkpoint, config, load_client
from pfedmoe_mpi.data.sources.open import open_dataset
from pfedmoe_mpi.errors import CheckpointError, DataError
from pfedmoe_mpi.federation import build
from support import launcher
from support.files import path_digest
from support.launcher import SMALL_RUN
from support.small_federation import shared_comm
from support.text_files import write_hospitals, write_news

METHODS = {
    "pfedmoe": (),
    "fedavg": (),
    "fedproto": ("--fedproto.answer", "prototype"),
    "fedtgp": ("--fedtgp.answer", "prototype"),
    "fedjets": ("--clients", "6", "--unseen.clients", "2", "--partition.kind", "pathological"),
    "fedmrl": (),
    "ensemble": ("--ensemble.models", "2"),
    "lg_fedavg": ("--train.precision", "bf16"),
    "fedapen": (),
    "fedmix": ("--unseen.clients", "1"),
    "apfl": ("--apfl.alpha", "0.3"),
    "fedbn": ("--model.pool", "shufflenet_v2_x0_5", "--data.size", "32", "--train.lr_shared", "0.01"),
    "fedem": (),
    "pfedafm": (),
}


def trained_by(session: launcher.Session, folder: Path, algorithm: str, *flags: str) -> Path:
    alike = algorithm in {"fedavg", "fedjets", "fedmix", "ensemble", "apfl", "fedem"}
    pool = ("--model.pool", "mlp5") if alike else ()
    more = ("--data.size", "12", "--data.samples", "300", "--rounds", "2", "--eval.batch", "7")
    name = ("--algorithm", algorithm, "--run.dir", algorithm)
    result = session(*SMALL_RUN, *more, *pool, *flags, *name, cwd=folder)
    assert result.code == 0, result.err
    return folder / algorithm


def client_test_rows(run: Path, client: int) -> tuple[np.ndarray, np.ndarray]:
    """Return raw samples and labels of a client's test part, read from the data."""
    settings = config.build(config.read_toml(run / "config.toml"))
    dataset = open_dataset(settings.data, settings.seed, clients=settings.clients)
    with checkpoint.Checkpoint(run / "checkpoints" / "round-000002.h5") as loaded:
        rows = loaded.partition("test")[client]
    return dataset.rows(rows), dataset.labels[rows]


@pytest.mark.parametrize("algorithm", METHODS)
def test_client_model_reproduces_the_measured_accuracy(
    session: launcher.Session, tmp_path: Path, algorithm: str
) -> None:
    run = trained_by(session, tmp_path, algorithm, *METHODS[algorithm])
    measured = launcher.read_metrics(run)[-1]["clients"]
    assert any(value is not None for value in measured["accuracy"])
    for client, accuracy in enumerate(measured["accuracy"]):
        x, y = client_test_rows(run, client)
        model = load_client(run / "checkpoints" / "round-000002.h5", client)
        logits = model.predict(x)
        assert logits.shape == (len(x), 10) and logits.dtype == torch.float32
        right = (logits.argmax(1).numpy() == y).sum()
        assert right / len(y) == accuracy, f"client {client}"
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y)).item()
        assert loss == pytest.approx(measured["loss"][client], rel=1e-5)
        if algorithm == "fedem":
            assert torch.equal(model.weights(x)[0], model.weights_), "a part with the name of a method"


@pytest.mark.parametrize("source", ["heart", "text"])
def test_client_model_reads_patients_and_texts(
    session: launcher.Session, tmp_path: Path, source: str
) -> None:
    heart = source == "heart"
    path = write_hospitals(tmp_path / "data") if heart else write_news(tmp_path / "news.csv")
    few = ("--clients", "3", "--partition.alpha", "100") if not heart else ()
    flags = ("--data.source", source, "--data.path", str(path), *few, "--rounds", "2", "--run.dir", "run")
    result = session(*flags, "--train.device", "cpu", cwd=tmp_path)
    assert result.code == 0, result.err
    run = tmp_path / "run"
    built = build.build(shared_comm(), config.build(config.read_toml(run / "config.toml")))
    for client, accuracy in enumerate(launcher.read_metrics(run)[-1]["clients"]["accuracy"]):
        test = built.clients[client].splits["test"]
        answers = load_client(run / "checkpoints" / "round-000002.h5", client).predict(test.x).argmax(1)
        assert (answers == test.y).double().mean() == accuracy


def test_client_model_is_an_ordinary_module(trained: Path, tmp_path: Path) -> None:
    path = trained / "checkpoints" / "best.h5"
    before = path_digest(path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model, other = load_client(str(path), 1), load_client(path, 3)
    assert torch.equal(torch.rand(3), expected), "the user's random numbers are the user's"
    assert {name for name, _ in model.named_children()} == {"shared", "model", "gate"}
    assert model._parts().modules() == dict(model.named_children()), "methods may ask for all modules"
    assert not model.training
    x = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), np.uint8)
    first = model.predict(x)
    assert not torch.equal(first, other.predict(x))
    assert torch.equal(first, model.predict(torch.from_numpy(x)))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(first, other.predict(x))
    model.train()
    assert torch.equal(model(x), model(torch.from_numpy(x)))
    loss = torch.nn.functional.cross_entropy(model(x), torch.zeros(5, dtype=torch.long))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters()), "fine-tuning reaches every part"
    model.predict(x)
    assert model.training, "predict leaves the mode as it was"
    assert path_digest(path) == before


FEW = ("--partition.kind", "pathological", "--participation", "0.25")  # two clients of two classes train


@pytest.mark.parametrize(
    ("algorithm", "flags"),
    [("pfedmoe", ()), ("fedtgp", ()), ("standalone", ()), ("fedproto", FEW)],
    ids=["pfedmoe", "fedtgp", "standalone", "undefined prototypes"],
)
def test_exported_client_gives_the_same_answers(
    run_command: Callable[..., launcher.Result],
    session: launcher.Session,
    tmp_path: Path,
    algorithm: str,
    flags: tuple[str, ...],
) -> None:
    path = trained_by(session, tmp_path, algorithm, *flags) / "checkpoints" / "round-000002.h5"
    run_command("export", path, "--client", "2", "two.h5")
    whole, alone = load_client(path, 2), load_client(tmp_path / "two.h5")
    assert alone.client == 2
    ours, theirs = whole.state_dict(), alone.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)
    assert bool(flags) == any(bool(tensor.isnan().any()) for tensor in ours.values())
    x = np.random.default_rng(0).integers(0, 256, (9, 3, 12, 12), np.uint8)
    assert torch.equal(whole.predict(x), alone.predict(x))


def test_file_that_is_not_an_exported_client_is_refused(
    run_command: Callable[..., launcher.Result], run: Path
) -> None:
    path = run / "checkpoints" / "best.h5"
    with pytest.raises(CheckpointError, match="no client number was passed"):
        load_client(path)
    out = run.parent / "one.h5"

    def refused(said: str, client: int | None = None) -> None:
        with pytest.raises(CheckpointError, match=said):
            load_client(out, client)

    refused("one.h5")
    run_command("export", path, "--client", "1", out)
    assert load_client(out, 1).client == 1
    refused("holds only client 1, not client 2", 2)
    with h5py.File(out, "r+") as file:
        samples = file.attrs.pop("samples")
    refused("its attribute 'samples' is missing")
    with h5py.File(out, "r+") as file:
        file.attrs["samples"] = "[]"
    refused("does not describe its samples")
    with h5py.File(out, "r+") as file:
        file.attrs["samples"] = samples
        name = next(f"model/{key}" for key in file["model"] if isinstance(file["model"][key], h5py.Dataset))
        file[name][...] = np.nan
    refused(f"{name} is not finite")
    with h5py.File(out, "r+") as file:
        del file[name]
        file[name] = np.zeros(3, np.float32)
    refused(f"{name} is not")
    with h5py.File(out, "r+") as file:
        del file[name]
        file[name] = h5py.ExternalLink(path, "server/state")
    refused("is a link")


def test_original_size_samples_are_resized(trained: Path) -> None:
    model = load_client(trained / "checkpoints" / "best.h5", 0)
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), np.uint8)
    assert model.predict(x).shape == (2, 10)
    wrong: tuple[tuple[np.ndarray, str], ...] = (
        (x[:, :1], "shape"),
        (x.astype(np.float32) / 255, "float32"),
        (x[0], "shape"),
    )
    for samples, said in wrong:
        with pytest.raises(DataError, match=said):
            model.predict(samples)


def test_client_without_a_model_is_refused(session: launcher.Session, tmp_path: Path, trained: Path) -> None:
    with pytest.raises(CheckpointError, match="no client 9"):
        load_client(trained / "checkpoints" / "best.h5", 9)
    flags = ("--unseen.clients", "1", "--partition.kind", "pathological", "--clients", "6")
    run = trained_by(session, tmp_path, "pfedmoe", *flags)
    never = [
        k for k, value in enumerate(launcher.read_metrics(run)[-1]["clients"]["accuracy"]) if value is None
    ]
    assert len(never) == 1
    with pytest.raises(CheckpointError, match="never trained"):
        load_client(run / "checkpoints" / "round-000002.h5", never[0])
