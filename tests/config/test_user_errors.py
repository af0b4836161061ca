"""Wrong flags, files and data: exit code 2, one message with a remedy, and nothing written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from support.files import path_digest
from support.launcher import Result, Session

# Words and flags


@pytest.mark.parametrize(
    ("pattern", "arguments"),
    [
        ("no flag --rouns\n  remedy: use --rounds$", ["--rouns", "3"]),
        ("no flag --train.lrr\n  remedy: use --train.lr$", ["--train.lrr=3"]),
        ("no flag -n\n  remedy: `pfedmoe-mpi run --help` lists", ["-n", "4"]),
        ("no flag --roun\n", ["--roun", "4"]),
        ("--rounds: expected a value", ["--rounds"]),
        ("--rounds: expected a value", ["--rounds", "--clients", "3"]),
        ("--dry: expected true or false, not 'yes'\n  remedy: `pfedmoe-mpi run --help`", ["--dry", "yes"]),
        ("no flag --lr\n  remedy: use --train.lr or --train.lr_shared$", ["--lr", "0.1"]),
        ("--run.scale is not a flag: the program writes it", ["--run.scale", "0.5"]),
        ("data.source = digits reads no file(.|\n)*set --data.source", ["--data.path", "my.h5"]),
        ("rounds = 'many'", ["--rounds", "many"]),
        ("participation = '2'", ["--participation", "2"]),
        ("'trian' is neither a command nor a configuration file; did you mean", ["trian"]),
        ("'restrat' is neither .*; did you mean 'restart'", ["restrat", "runs/x"]),
        ("no configuration file none.toml", ["none.toml"]),
        ("run does not expect 'b.toml'\n  remedy: pfedmoe-mpi run ", ["run", "a.toml", "b.toml"]),
        ("restart needs RUN_DIR.CHECKPOINT.h5\n  remedy: pfedmoe-mpi restart runs/NAME$", ["restart"]),
        ("evaluate needs CHECKPOINT.h5", ["evaluate"]),
        ("inspect needs CHECKPOINT.h5", ["inspect"]),
        ("--digest: expected no value, not 'true'", ["inspect", "a.h5", "--digest=true"]),
        ("inspect does not expect 'b.h5'", ["inspect", "a.h5", "b.h5"]),
        ("export needs OUT.h5", ["export", "a.h5", "--client", "1"]),
        ("export needs --client", ["export", "a.h5", "b.h5"]),
        ("--client: expected a number such as 7, not '-1'", ["export", "a.h5", "b.h5", "--client", "-1"]),
        ("--client: expected a number such as 7, not '²'", ["export", "a.h5", "b.h5", "--client", "²"]),
        ("inspect has no flag --rounds", ["inspect", "a.h5", "--rounds", "3"]),
        ("export has no flag --seed", ["export", "a.h5", "b.h5", "--client", "1", "--seed", "3"]),
        ("report has no flag --basline\n  remedy: use --baseline$", ["report", "a", "--basline", "b"]),
        ("report needs RUN_DIR\n  remedy: pfedmoe-mpi report runs/NAME$", ["report"]),
        (
            "no flag --target\n  remedy: remove --target, a flag of `report`$",
            ["evaluate", "a.h5", "--target", "1"],
        ),
        ("no flag --dry\n  remedy: remove --dry, a flag of `run`.* `fork` or", ["evaluate", "a", "--dry"]),
        ("no flag --out\n  remedy: use --run.dir$", ["run", "--out", "a"]),
        ("no flag --no-dry\n  remedy: use --dry false$", ["--no-dry"]),
        ("no flag --no_run.force\n  remedy: use --run.force false$", ["--no_run.force"]),
        ("'' is neither a command nor", [""]),
        ("'help' is neither a command nor a configuration file\n", ["run", "help"]),
        (
            "b' *\n  remedy: pfedmoe-mpi reproduce .*--dry .*TABLE.toml .--SETTING VALUE ...]$",
            ["reproduce", "a", "b"],
        ),
        ("--json: expected true or false", ["evaluate", "a.h5", "--json", "perhaps"]),
        ("--scale: expected a number above 0 and at most 1", ["reproduce", "t.toml", "--scale", "0"]),
        ("data prepare or data partition\n  remedy: pfedmoe-mpi data prepare --help$", ["data"]),
        ("data prepare or data partition", ["data", "prepear", "x.h5"]),
        ("data prepare needs OUT.h5", ["data", "prepare"]),
        ("no command reprot; did you mean 'report'", ["help", "reprot"]),
        ("shell: invalid choice: 'fish'", ["completion", "fish"]),
    ],
)
def test_wrong_command_lines_are_refused(
    assert_refused: Callable[..., str], pattern: str, arguments: list[str]
) -> None:
    assert_refused(pattern, *arguments)


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
def test_wrong_configuration_files_are_refused(
    assert_refused: Callable[..., str], tmp_path: Path, pattern: str, text: str | bytes
) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(pattern, path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data.source", "hdf5", "--data.path", "~no-such-user/d.h5"],
        ["--run.dir", "~no-such-user"],
        ["--model.weights", "cnn5=~no-such-user/w.pth"],
        ["--algorithm", "~no-such-user/mine.py"],
    ],
)
def test_home_folder_of_nobody_is_refused(assert_refused: Callable[..., str], arguments: list[str]) -> None:
    assert_refused("there is no home folder ~no-such-user\n  remedy: write the path", *arguments)


def test_checkpoint_or_run_folder_is_not_a_configuration(
    assert_refused: Callable[..., str], run: Path
) -> None:
    for path in (run, run / "checkpoints" / "round-000003.h5"):
        assert f"restart {path}" in assert_refused("cannot be read as TOML", "run", path)


# Contradictions that need the data, or torch


@pytest.mark.parametrize(
    ("pattern", "arguments"),
    [
        (
            "partition.classes = 11, but the data have 10",
            ["--partition.kind", "pathological", "--partition.classes", "11"],
        ),
        ("partition.classes = 99", ["--partition.kind", "classes", "--partition.classes", "99"]),
        ("fedavg needs equal models, but model.pool = mlp5,mlp4", ["--algorithm", "fedavg"]),
        ("scaffold needs equal models", ["--algorithm", "scaffold"]),
        ("combines auto with architectures", ["--model.pool", "auto,mlp5"]),
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
        ("clients = 200 with partition.min_samples = 10 need 2000 rows", ["--clients", "200"]),
        ("data.samples = 200 is below the number of clients", ["--clients", "500"]),
        (
            "none of partition.tries = 2 draws satisfied(.|\n)*take more rows .now 200.*--clients .now 19",
            ["--partition.alpha", "0.001", "--clients", "19", "--partition.tries", "2"],
        ),
        ("run.scratch = /proc cannot be written", ["--run.scratch", "/proc"]),
        ("run.scratch = .*nowhere is missing", ["--run.scratch", "nowhere"]),
        ("partition.pool = official needs data with", ["--partition.pool", "official"]),
        (
            "clients = 3, but the data have 4 natural clients|client 0 has|natural",
            ["--partition.kind", "natural", "--partition.min_samples", "60"],
        ),
        (
            "1 training row",
            ["--partition.kind", "iid", "--clients", "20", "--partition.test_fraction", "0.9"],
        ),
        ("data.mean and data.std have 1 numbers", ["--data.mean", "0.5", "--data.std", "0.5"]),
    ],
)
def test_contradicting_flags_are_refused(
    assert_refused: Callable[..., str], small_run: tuple[str, ...], pattern: str, arguments: list[str]
) -> None:
    assert_refused(pattern, *small_run, *arguments)


def test_digits_without_natural_clients_are_refused(assert_refused: Callable[..., str]) -> None:
    assert_refused("partition.kind = natural needs data that name", "--partition.kind", "natural")


@pytest.mark.parametrize("dry", ["true", "false"])
def test_missing_gpu_is_reported(
    assert_refused: Callable[..., str], small_run: tuple[str, ...], dry: str
) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("a GPU is visible")
    assert_refused("rank 0 sees no GPU", *small_run, "--train.device", "cuda", "--dry", dry)


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
        ("channels as the last dimension", {"x": X.transpose(0, 2, 3, 1), "y": Y}),
        ("float64", {"x": X, "y": Y + 0.5}),
        ("holds a NaN", {"x": NAN, "y": Y}),
        ("is empty", {"x": X[:0], "y": Y[:0]}),
        ("client", {"x": X, "y": Y, "client": Y * 2}),
    ],
)
def test_unusable_hdf5_files_are_refused(
    assert_refused: Callable[..., str], tmp_path: Path, pattern: str, tables: dict[str, Any]
) -> None:
    path = table(tmp_path / "d.h5", **tables)
    for command in ([], ["data", "partition", tmp_path / "p.h5"]):
        assert_refused(pattern, *command, "--data.source", "hdf5", "--data.path", path, "--clients", "2")


@pytest.mark.parametrize("source", ["hdf5", "folder", "npz", "torchvision"])
def test_missing_data_are_reported(assert_refused: Callable[..., str], tmp_path: Path, source: str) -> None:
    assert_refused(f"data.source = {source} .* data.path is empty", "--data.source", source)
    assert_refused(str(tmp_path / "none"), "--data.source", source, "--data.path", "none")


def test_missing_download_names_the_download_command(
    assert_refused: Callable[..., str], tmp_path: Path
) -> None:
    message = assert_refused(
        "CIFAR100 is not downloaded",
        "--data.source",
        "torchvision",
        "--data.name",
        "cifar100",
        "--data.path",
        ".",
    )
    assert "data prepare" in message and str(tmp_path) in message
    assert_refused(
        "data.name = 'cifar11' is unknown; did you mean",
        "--data.source",
        "torchvision",
        "--data.name",
        "cifar11",
        "--data.path",
        ".",
    )


def test_unreadable_hdf5_is_refused(assert_refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "d.h5"
    path.write_bytes(b"no HDF5 at all")
    assert_refused("cannot be opened as HDF5", "--data.source", "hdf5", "--data.path", path)
    table(path, x=X, y=Y)
    path.write_bytes(path.read_bytes()[:-2000])
    assert_refused("cannot be", "--data.source", "hdf5", "--data.path", path, "--clients", "2")


def test_unusable_image_folders_are_refused(assert_refused: Callable[..., str], tmp_path: Path) -> None:
    flags = ("--data.source", "folder", "--data.path", tmp_path / "images")
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
    assert_refused("holds no image", *flags)
    (tmp_path / "images" / "a" / "1.png").write_bytes(b"no image")
    (tmp_path / "images" / "b" / "1.png").write_bytes(b"no image")
    assert_refused("1.png cannot be read as an image", *flags)


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
        ("40 samples, but labels of int64 \\(30,\\)", {"x": X, "y": Y[:30]}),
        ("holds a NaN", {"x": NAN, "y": Y}),
        ("class 1 has no row", {"x": X, "y": np.where(Y == 1, 0, Y)}),
    ],
)
def test_unusable_npz_files_are_refused(
    assert_refused: Callable[..., str], tmp_path: Path, pattern: str, content: Any
) -> None:
    client_file(tmp_path / "d" / "train" / "0.npz", content)
    assert_refused(pattern, "--data.source", "npz", "--data.path", tmp_path / "d", "--clients", "1")


def test_npz_clients_of_different_shapes_are_refused(
    assert_refused: Callable[..., str], run_command: Callable[..., Result], tmp_path: Path
) -> None:
    client_file(tmp_path / "d" / "train" / "0.npz", {"x": X, "y": Y})
    client_file(tmp_path / "d" / "train" / "1.npz", {"x": X[..., :4], "y": Y})
    flags = ("--data.source", "npz", "--data.path", tmp_path / "d")
    assert_refused("x of client 1 is uint8", *flags)
    client_file(tmp_path / "d" / "train" / "1.npz", {"x": X, "y": Y})
    assert_refused("clients = 3, but the data have 2 natural clients", *flags, "--clients", "3")
    assert "proposed by the data: partition.kind = natural, clients = 2" in run_command(*flags, "--dry").out


def test_unwritable_output_is_refused(assert_refused: Callable[..., str], run: Path, tmp_path: Path) -> None:
    source = run / "checkpoints" / "round-000003.h5"
    assert_refused("exists already", "export", source, "--client", "1", source)
    assert_refused("there is no folder", "export", source, "--client", "1", tmp_path / "no" / "out.h5")
    assert_refused("exists and is not overwritten", "data", "prepare", source)
    assert_refused("no folder", "data", "partition", tmp_path / "no" / "out.h5")


def test_unknown_client_is_refused(assert_refused: Callable[..., str], run: Path) -> None:
    source = run / "checkpoints" / "round-000003.h5"
    assert "0 to 3" in assert_refused("no client 4", "export", source, "--client", "4", "out.h5")


# Run folders


def test_existing_run_folder_is_kept_or_renamed(
    assert_refused: Callable[..., str],
    session: Session,
    small_run: tuple[str, ...],
    run: Path,
    tmp_path: Path,
) -> None:
    before = path_digest(run)
    message = assert_refused("exists already", *small_run, "--run.dir", "run")
    assert "restart" in message and "--run.force true" in message
    for _ in range(2):
        assert session(*small_run, "--run.dir", "run", "--run.force", "true", cwd=tmp_path).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.old", "run.old.2"]
    assert path_digest(tmp_path / "run.old") == before, "nothing is deleted or changed"
    assert (tmp_path / "run" / "config.toml").exists()


def test_folder_of_other_files_is_never_renamed(
    assert_refused: Callable[..., str], small_run: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    for force in ("true", "false"):
        assert_refused(
            "is not empty and not a run folder", *small_run, "--run.dir", "thesis", "--run.force", force
        )


def test_empty_run_folder_is_accepted(session: Session, small_run: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    assert session(*small_run, "--run.dir", "new", cwd=tmp_path).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_file_in_place_of_the_run_folder_is_refused(
    assert_refused: Callable[..., str], small_run: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert_refused("is a file", *small_run, "--run.dir", "file", "--run.force", "true")
    assert_refused("cannot be created", *small_run, "--run.dir", "file/below")
