"""What a user gets wrong in flags, files and data: exit code 2, one message with its remedy, no trace."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from support.launcher import Result, Session, digest

# Words and flags


@pytest.mark.parametrize(
    ("pattern", "arguments"),
    [
        ("no flag --rouns; did you mean 'rounds'", ["--rouns", "3"]),
        ("no flag --train.lrr; did you mean 'train.lr'", ["--train.lrr=3"]),
        ("no flag -n", ["-n", "4"]),
        ("--rounds needs a value", ["--rounds"]),
        ("--rounds needs a value", ["--rounds", "--clients", "3"]),
        ("--dry yes: neither true nor false", ["--dry", "yes"]),
        ("no flag --lr; did you mean 'train.lr' or", ["--lr", "0.1"]),
        ("data.source digits reads no file(.|\n)*--data.source tells", ["--data.path", "my.h5"]),
        ("expected CHECKPOINT.h5, not nothing\n  remedy: python -m pfedmoe_mpi inspect .*$", ["inspect"]),
        ("rounds = 'many'", ["--rounds", "many"]),
        ("participation = '2'", ["--participation", "2"]),
        ("trian is neither a command nor a configuration file; did you mean", ["trian"]),
        ("not restrat runs/x; did you mean 'restart'", ["restrat", "runs/x"]),
        ("no configuration file none.toml", ["none.toml"]),
        ("at most one CONFIG.toml", ["run", "a.toml", "b.toml"]),
        ("expected RUN_DIR or CHECKPOINT.h5, not nothing", ["restart"]),
        ("expected CHECKPOINT.h5, not nothing", ["evaluate"]),
        ("expected CHECKPOINT.h5, not nothing", ["inspect"]),
        ("expected CHECKPOINT.h5 OUT.h5, not a.h5", ["export", "a.h5", "--client", "1"]),
        ("--client is missing", ["export", "a.h5", "b.h5"]),
        ("--client -1", ["export", "a.h5", "b.h5", "--client", "-1"]),
        ("--client ²", ["export", "a.h5", "b.h5", "--client", "²"]),
        ("inspect takes no --rounds", ["inspect", "a.h5", "--rounds", "3"]),
        ("export takes no --seed", ["export", "a.h5", "b.h5", "--client", "1", "--seed", "3"]),
        ("--json perhaps: neither", ["evaluate", "a.h5", "--json", "perhaps"]),
        ("data prepare or data partition", ["data"]),
        ("data prepare or data partition", ["data", "prepear", "x.h5"]),
        ("data prepare needs one output file", ["data", "prepare"]),
    ],
)
def test_command_lines(refused: Callable[..., str], pattern: str, arguments: list[str]) -> None:
    refused(pattern, *arguments)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("cannot be read as TOML.*line 2", "rounds = 3\nclients four\n"),
        ("no setting 'train.lrr'; did you mean 'train.lr'", "[train]\nlrr = 3\n"),
        ("no setting 'train'", "train = 3\n"),
        ("rounds = 'three'", 'rounds = "three"\n'),
        ("rounds = true", "rounds = true\n"),
        ("run.force = 1", "[run]\nforce = 1\n"),
        ("no algorithm 'fedag'; did you mean 'fedavg'", 'algorithm = "fedag"\n'),
        ("cannot be read as TOML", b"\x89HDF\r\n\x1a\n\xff"),
    ],
)
def test_configuration_files(
    refused: Callable[..., str], tmp_path: Path, pattern: str, text: str | bytes
) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(pattern, path)


def test_a_checkpoint_or_a_run_folder_is_no_configuration(refused: Callable[..., str], run: Path) -> None:
    for path in (run, run / "checkpoints" / "round-000003.h5"):
        assert f"restart {path}" in refused("cannot be read as TOML", "run", path)


# Contradictions that need the data, or torch


@pytest.mark.parametrize(
    ("pattern", "arguments"),
    [
        (
            "partition.classes is 11, but the data have 10",
            ["--partition.kind", "pathological", "--partition.classes", "11"],
        ),
        ("partition.classes is 99", ["--partition.kind", "classes", "--partition.classes", "99"]),
        ("fedavg needs equal models, but model.pool has mlp5, mlp4", ["--algorithm", "fedavg"]),
        ("scaffold needs equal models", ["--algorithm", "scaffold"]),
        ("auto stands alone", ["--model.pool", "auto,mlp5"]),
        (
            "one length, but cnn1 has 500 and mnist5 has 50",
            ["--model.pool", "cnn1", "--model.shared", "mnist5", "--model.dim", "0"],
        ),
        (
            "one length, but mnist1 has 50 and cnn5 has 500",
            ["--model.pool", "mnist1,cnn5", "--model.shared", "auto", "--data.size", "32"],
        ),
        ("model cnn1 cannot take 3x8x8: needs at least 3x16x16", ["--model.pool", "cnn1"]),
        ("model vgg11 cannot take 3x8x8", ["--model.pool", "vgg11"]),
        ("200 clients of partition.min_samples 10 need 2000 rows", ["--clients", "200"]),
        ("data.samples 200 is below the number of clients", ["--clients", "500"]),
        (
            "no draw of partition.tries 2 met",
            ["--partition.alpha", "0.001", "--clients", "19", "--partition.tries", "2"],
        ),
        ("official needs data with", ["--partition.pool", "official"]),
        (
            "the data have 4 natural clients, not 3|client 0 has|natural",
            ["--partition.kind", "natural", "--partition.min_samples", "60"],
        ),
        (
            "1 training row",
            ["--partition.kind", "iid", "--clients", "20", "--partition.test_fraction", "0.9"],
        ),
        ("data.mean and data.std have 1 numbers", ["--data.mean", "0.5", "--data.std", "0.5"]),
    ],
)
def test_contradictions(
    refused: Callable[..., str], small: tuple[str, ...], pattern: str, arguments: list[str]
) -> None:
    refused(pattern, *small, *arguments)


def test_digits_have_no_natural_clients(refused: Callable[..., str]) -> None:
    refused("partition.kind natural needs data that say", "--partition.kind", "natural")


@pytest.mark.parametrize("dry", ["true", "false"])
def test_no_gpu_here(refused: Callable[..., str], small: tuple[str, ...], dry: str) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("a GPU is visible")
    refused("rank 0 sees no GPU", *small, "--train.device", "cuda", "--dry", dry)


# Data


def table(path: Path, **tables: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, value in tables.items():
            file[name] = value
    return path


X = np.zeros((40, 3, 8, 8), np.uint8)
Y = np.arange(40) % 4
NAN = np.full((40, 5), np.nan, np.float32)


@pytest.mark.parametrize(
    ("pattern", "tables"),
    [
        ("no dataset 'y'", {"x": X}),
        ("no dataset 'x'; it has nothing", {}),
        ("x of .* is int64", {"x": X.astype(np.int64), "y": Y}),
        ("y has shape", {"x": X, "y": Y[:30]}),
        ("has shape \\(40,\\)", {"x": X[:, 0, 0, 0], "y": Y}),
        ("channels in the last place", {"x": X.transpose(0, 2, 3, 1), "y": Y}),
        ("class 2 has no row", {"x": X, "y": np.where(Y == 2, 3, Y)}),
        ("row 0 has -1", {"x": X, "y": Y - 1}),
        ("subtract 1", {"x": X, "y": Y + 1}),
        ("float64", {"x": X, "y": Y + 0.5}),
        ("holds a NaN", {"x": NAN, "y": Y}),
        ("is empty", {"x": X[:0], "y": Y[:0]}),
        ("client", {"x": X, "y": Y, "client": Y * 2}),
    ],
)
def test_hdf5(refused: Callable[..., str], tmp_path: Path, pattern: str, tables: dict[str, Any]) -> None:
    path = table(tmp_path / "d.h5", **tables)
    for command in ([], ["data", "partition", tmp_path / "p.h5"]):
        refused(pattern, *command, "--data.source", "hdf5", "--data.path", path, "--clients", "2")


@pytest.mark.parametrize("source", ["hdf5", "folder", "npz", "torchvision"])
def test_missing_data(refused: Callable[..., str], tmp_path: Path, source: str) -> None:
    refused(f"data.source {source} needs --data.path", "--data.source", source)
    refused(str(tmp_path / "none"), "--data.source", source, "--data.path", "none")


def test_data_that_are_not_downloaded_are_named_with_the_command_that_does(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    message = refused(
        "CIFAR100 is not downloaded",
        "--data.source",
        "torchvision",
        "--data.name",
        "cifar100",
        "--data.path",
        ".",
    )
    assert "data prepare" in message and str(tmp_path) in message
    refused(
        "no data.name 'cifar11'; did you mean",
        "--data.source",
        "torchvision",
        "--data.name",
        "cifar11",
        "--data.path",
        ".",
    )


def test_unreadable_hdf5(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "d.h5"
    path.write_bytes(b"no HDF5 at all")
    refused("cannot be opened as HDF5", "--data.source", "hdf5", "--data.path", path)
    table(path, x=X, y=Y)
    path.write_bytes(path.read_bytes()[:-2000])
    refused("cannot be", "--data.source", "hdf5", "--data.path", path, "--clients", "2")


def test_image_folders(refused: Callable[..., str], tmp_path: Path) -> None:
    flags = ("--data.source", "folder", "--data.path", tmp_path / "images")
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
    refused("holds no image", *flags)
    (tmp_path / "images" / "a" / "1.png").write_bytes(b"no image")
    (tmp_path / "images" / "b" / "1.png").write_bytes(b"no image")
    refused("1.png cannot be read as an image", *flags)


def client_file(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, data=content)


class Harmful:
    """A pickle that would make a file when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    ("pattern", "content"),
    [
        ("posix.mkdir, which is not an array", {"x": Harmful(), "y": Y}),
        ("pathlib.*, which is not an array", {"x": Path(), "y": Y}),
        ("not one dict of arrays", np.array([None, None])),
        ("no arrays x and y", {"x": X}),
        ("40 samples and labels of int64 \\(30,\\)", {"x": X, "y": Y[:30]}),
        ("holds a NaN", {"x": NAN, "y": Y}),
        ("class 1 has no row", {"x": X, "y": np.where(Y == 1, 0, Y)}),
    ],
)
def test_npz(refused: Callable[..., str], tmp_path: Path, pattern: str, content: Any) -> None:
    client_file(tmp_path / "d" / "train" / "0.npz", content)
    refused(pattern, "--data.source", "npz", "--data.path", tmp_path / "d", "--clients", "1")


def test_npz_of_unlike_clients(
    refused: Callable[..., str], done: Callable[..., Result], tmp_path: Path
) -> None:
    client_file(tmp_path / "d" / "train" / "0.npz", {"x": X, "y": Y})
    client_file(tmp_path / "d" / "train" / "1.npz", {"x": X[..., :4], "y": Y})
    flags = ("--data.source", "npz", "--data.path", tmp_path / "d")
    refused("x of client 1 is uint8", *flags)
    client_file(tmp_path / "d" / "train" / "1.npz", {"x": X, "y": Y})
    refused("2 natural clients, not 3", *flags, "--clients", "3")
    assert "as the data propose: partition.kind natural, clients 2" in done(*flags, "--dry").out


def test_output_that_cannot_be_written(refused: Callable[..., str], run: Path, tmp_path: Path) -> None:
    source = run / "checkpoints" / "round-000003.h5"
    refused("exists already", "export", source, "--client", "1", source)
    refused("cannot be written", "export", source, "--client", "1", tmp_path / "no" / "out.h5")
    refused("exists and is not overwritten", "data", "prepare", source)
    refused("no folder", "data", "partition", tmp_path / "no" / "out.h5")


def test_no_such_client(refused: Callable[..., str], run: Path) -> None:
    source = run / "checkpoints" / "round-000003.h5"
    assert "0 to 3" in refused("no client 4", "export", source, "--client", "4", "out.h5")


# Run folders


def test_an_existing_run_folder_is_kept_or_renamed(
    refused: Callable[..., str], session: Session, small: tuple[str, ...], run: Path, tmp_path: Path
) -> None:
    before = digest(run)
    message = refused("exists already", *small, "--run.dir", "run")
    assert "restart" in message and "--run.force true" in message
    for _ in range(2):
        assert session(*small, "--run.dir", "run", "--run.force", "true", cwd=tmp_path).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.old", "run.old.2"]
    assert digest(tmp_path / "run.old") == before, "nothing is deleted or changed"
    assert (tmp_path / "run" / "config.toml").exists()


def test_a_folder_of_other_things_is_never_renamed(
    refused: Callable[..., str], small: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    for force in ("true", "false"):
        refused("holds other things than a run", *small, "--run.dir", "thesis", "--run.force", force)


def test_an_empty_folder_is_no_obstacle(session: Session, small: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    assert session(*small, "--run.dir", "new", cwd=tmp_path).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_a_file_where_the_folder_should_be(
    refused: Callable[..., str], small: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    refused("is a file", *small, "--run.dir", "file", "--run.force", "true")
    refused("cannot be made", *small, "--run.dir", "file/below")
