"""What a user gets wrong: exit code 2, one message from one rank with the remedy in it, nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from launcher import Result, Session, digest, program

REMEDY = "remedy: "


def told(result: Result, pattern: str) -> str:
    """The one message of a refused command line; it matches `pattern` and holds a remedy."""
    assert result.code == 2, f"exit {result.code}\n{result.out}\n{result.err}"
    assert result.err.count("error: ") == 1 and result.err.count(REMEDY) == 1, result.err
    assert "Traceback" not in result.err and "Warning" not in result.err
    message = result.err[result.err.index("error: ") :]
    assert re.search(pattern, message), message
    assert message.split(REMEDY)[1].strip(), "an empty remedy"
    return message


@pytest.fixture
def refused(session: Session, tmp_path: Path) -> Callable[..., str]:
    """Runs a command line in `tmp_path`, where nothing may change, and returns its message."""

    def check(pattern: str, *arguments: str | Path) -> str:
        before = digest(tmp_path), sorted(tmp_path.rglob("*"))
        result = session(*map(str, arguments), cwd=tmp_path)
        assert (digest(tmp_path), sorted(tmp_path.rglob("*"))) == before, "something was written"
        return told(result, pattern)

    return check


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A finished run of the test's own."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


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
            "one length, but cnn1 in 500 and mnist5 in 50",
            ["--model.pool", "cnn1", "--model.shared", "mnist5", "--model.dim", "0"],
        ),
        (
            "one length, but mnist1 in 50 and cnn5 in 500",
            ["--model.pool", "mnist1", "--model.shared", "auto", "--data.size", "32"],
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


def test_npz_of_unlike_clients(refused: Callable[..., str], tmp_path: Path) -> None:
    client_file(tmp_path / "d" / "train" / "0.npz", {"x": X, "y": Y})
    client_file(tmp_path / "d" / "train" / "1.npz", {"x": X[..., :4], "y": Y})
    flags = ("--data.source", "npz", "--data.path", tmp_path / "d")
    refused("x of client 1 is uint8", *flags)
    client_file(tmp_path / "d" / "train" / "1.npz", {"x": X, "y": Y})
    refused("2 natural clients, not 20", *flags, "--partition.kind", "natural")


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


# Damaged checkpoints


def flip(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 16]))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def unseal(path: Path) -> None:
    """As a file renamed before it was sealed: HDF5 is whole, the user block is empty."""
    with open(path, "r+b") as file:
        file.write(bytes(4096))


def another_format(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(struct.pack("<I", 77))


def first_half(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


DAMAGE: list[tuple[str, Callable[[Path], object]]] = [
    ("no checkpoint|no run folder or checkpoint", Path.unlink),
    ("is truncated", truncate),
    ("not a finished checkpoint", lambda path: path.write_bytes(b"")),
    ("not a finished checkpoint", lambda path: path.write_text("rounds = 3")),
    ("not a finished checkpoint", unseal),
    ("format version 77", another_format),
    ("its seal does not match", lambda path: flip(path, 40)),
    ("is damaged", first_half),
    ("its bytes", lambda path: flip(path, 4096 + 100)),
    ("is damaged", lambda path: flip(path, path.stat().st_size - 1)),
]


@pytest.mark.parametrize(("pattern", "damage"), DAMAGE)
def test_damaged_checkpoints(
    refused: Callable[..., str], run: Path, pattern: str, damage: Callable[[Path], object]
) -> None:
    path = run / "checkpoints" / "round-000003.h5"
    damage(path)
    for arguments in (
        ("restart", path),
        ("evaluate", path),
        ("inspect", path),
        ("inspect", path, "--digest"),
        ("export", path, "--client", "1", "out.h5"),
    ):
        refused(pattern, *arguments)


def test_any_flipped_bit_is_found(session: Session, run: Path, tmp_path: Path) -> None:
    """One byte in each of 60 stretches of the file, the user block's unused rest excepted."""
    path = run / "checkpoints" / "round-000003.h5"
    good = path.read_bytes()
    random = np.random.default_rng(4)
    for first, last in [
        (0, 200),
        *((a, a + len(good) // 60) for a in range(4096, len(good), len(good) // 60)),
    ]:
        place = int(random.integers(first, min(last, len(good))))
        flip(path, place)
        told(session("inspect", str(path), cwd=tmp_path), "checkpoint|damaged|truncated|format")
        path.write_bytes(good)
    assert session("inspect", str(path), cwd=tmp_path).code == 0


def test_nothing_to_restart_from(refused: Callable[..., str], run: Path, tmp_path: Path) -> None:
    refused("no run folder or checkpoint", "restart", "none")
    (tmp_path / "empty").mkdir()
    refused("not a run folder", "restart", "empty")
    (run / "config.toml").unlink()
    for path in (run / "checkpoints").glob("round*"):
        truncate(path)
    assert "config.toml" in refused("no configuration file", "restart", run)


# Restarts that would be another run


@pytest.mark.parametrize(
    ("pattern", "arguments"),
    [
        ("seed: 0 → 1", ["--seed", "1"]),
        ("clients: 4 → 5", ["--clients", "5"]),
        ("algorithm: pfedmoe → standalone", ["--algorithm", "standalone"]),
        ("pfedmoe.share: True → False", ["--pfedmoe.share", "false"]),
        ("partition.alpha: 1.0 → 0.5", ["--partition.alpha", "0.5"]),
        ("partition.kind: dirichlet → iid", ["--partition.kind", "iid"]),
        ("model.pool: .*mlp5.*mlp4.* → .*mlp5.*mlp3", ["--model.pool", "mlp5,mlp3"]),
        ("model.dim: 500 → 64", ["--model.dim", "64"]),
        ("gate.hidden: 64 → 32", ["--gate.hidden", "32"]),
        ("seed: 0 → 1; clients: 4 → 5|clients: 4 → 5; seed: 0 → 1", ["--seed", "1", "--clients", "5"]),
        ("rounds = 'x'", ["--rounds", "x"]),
        ("no flag --sed; did you mean 'seed'", ["--sed", "1"]),
    ],
)
def test_restarts_that_would_be_another_run(
    refused: Callable[..., str], run: Path, pattern: str, arguments: list[str]
) -> None:
    refused(pattern, "restart", run, "--rounds", "4", *arguments)
    for path in (run / "checkpoints").glob("*.h5"):
        path.unlink()
    refused(pattern, "restart", run, "--rounds", "4", *arguments)  # round 0 from config.toml is no other case


def test_a_restart_with_other_data_is_refused(
    refused: Callable[..., str], session: Session, small: tuple[str, ...], tmp_path: Path
) -> None:
    made = session("data", "prepare", "d.h5", *small, cwd=tmp_path)
    assert made.code == 0, made.err
    flags = (*small, "--data.source", "hdf5", "--data.path", "d.h5", "--run.dir", "run")
    assert session(*flags, cwd=tmp_path).code == 0
    moved = tmp_path / "elsewhere.h5"
    (tmp_path / "d.h5").rename(moved)
    refused("d.h5", "restart", "run", "--rounds", "2")
    with h5py.File(moved, "r+") as file:
        file["x"][7, 0, 0, 0] ^= 1
    refused(
        "the data changed .*digest [0-9a-f]+… then, [0-9a-f]+… now", "restart", "run", "--data.path", moved
    )
    with h5py.File(moved, "r+") as file:
        file["x"][7, 0, 0, 0] ^= 1
    result = session("restart", "run", "--data.path", str(moved), "--rounds", "2", cwd=tmp_path)
    assert result.code == 0, "the same data in another place: " + result.err


def test_a_checkpoint_that_is_not_the_newest_needs_a_folder(
    refused: Callable[..., str], run: Path, tmp_path: Path
) -> None:
    older, best = (run / "checkpoints" / name for name in ("round-000002.h5", "best.h5"))
    for path in (older, best):
        assert "--run.dir" in refused("not the newest checkpoint", "restart", path)
        refused("not the newest checkpoint", "restart", path, "--run.dir", run)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    refused("exists already", "restart", older, "--run.dir", "used")
    alone = tmp_path / "alone" / "round-000003.h5"
    alone.parent.mkdir()
    shutil.copy(run / "checkpoints" / "round-000003.h5", alone)
    refused("not the newest checkpoint of a run folder", "restart", alone)
    moved = run.rename(tmp_path / "moved")
    refused("not the newest checkpoint", "restart", moved / "checkpoints" / "round-000002.h5")


def test_a_finished_run_says_so(session: Session, run: Path, tmp_path: Path) -> None:
    before = digest(run)
    for source in (run, run / "checkpoints" / "round-000003.h5"):
        result = session("restart", str(source), cwd=tmp_path)
        assert (result.code, result.err) == (0, "") and "the run is finished: 3 of 3 rounds" in result.out
    assert digest(run) == before


def test_evaluation_on_data_the_models_cannot_take(
    refused: Callable[..., str], run: Path, tmp_path: Path
) -> None:
    source = run / "checkpoints" / "best.h5"
    path = table(tmp_path / "d.h5", x=np.zeros((200, 3, 8, 8), np.uint8), y=np.arange(200) % 3)
    refused(
        "do not take samples of 3×8×8 in 3 classes",
        "evaluate",
        source,
        "--data.source",
        "hdf5",
        "--data.path",
        path,
    )
    refused("clients: 4 → 5", "evaluate", source, "--clients", "5")
    refused("algorithm: pfedmoe → fedavg", "evaluate", source, "--algorithm", "fedavg")


# Launchers


@pytest.mark.parametrize(
    "variables",
    [
        {"PMI_SIZE": "4", "PMI_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"},
    ],
)
def test_ranks_that_believe_they_are_alone(
    small: tuple[str, ...], tmp_path: Path, variables: dict[str, str]
) -> None:
    result = program(0, *small, cwd=tmp_path, env=variables)
    message = told(result, "started 4 ranks, but each believes it is alone")
    assert "--mpi=pmi2" in message and "--run.singleton true" in message
    assert list(tmp_path.iterdir()) == []


STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}


def test_only_the_first_of_them_speaks(small: tuple[str, ...], tmp_path: Path) -> None:
    result = program(0, *small, cwd=tmp_path, env={**STEP, "SLURM_PROCID": "3"})
    assert (result.code, result.out + result.err) == (2, "")
    result = program(0, "--rouns", "3", cwd=tmp_path, env={**STEP, "SLURM_PROCID": "3"})
    assert (result.code, result.out + result.err) == (2, "")
    told(program(0, "--rouns", "3", cwd=tmp_path, env=STEP), "no flag --rouns")


def test_restarts_are_refused_too_unless_one_rank_is_meant(run: Path, tmp_path: Path) -> None:
    told(program(0, "restart", str(run), cwd=tmp_path, env=STEP), "each believes it is alone")
    meant = program(0, "restart", str(run), "--run.singleton", "true", cwd=tmp_path, env=STEP)
    assert meant.code == 0 and "the run is finished" in meant.out, meant.err


def test_one_rank_may_be_meant(small: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    dry = (*small, "--dry", "true")
    meant = program(0, *dry, "--run.singleton", "true", cwd=tmp_path, env=STEP)
    assert meant.code == 0, meant.err
    inherited = program(1, *dry, cwd=tmp_path, env=STEP)
    assert inherited.code == 0, "PMI_SIZE alone decides: " + inherited.err
    evaluated = program(0, "evaluate", str(run / "checkpoints" / "best.h5"), cwd=tmp_path, env=STEP)
    assert evaluated.code == 0, "only run and restart are refused: " + evaluated.err


BOTH = pytest.mark.parametrize("mpi", ["mpich", pytest.param("openmpi", marks=pytest.mark.openmpi)])


@BOTH
def test_one_message_of_several_ranks(small: tuple[str, ...], run: Path, tmp_path: Path, mpi: str) -> None:
    """Before MPI is started, after it, and for what every rank checks a part of."""
    damaged = run / "checkpoints" / "round-000003.h5"
    flip(damaged, damaged.stat().st_size - 1)
    before = digest(tmp_path), sorted(tmp_path.rglob("*"))
    for pattern, arguments in (
        ("no configuration file", ("run", "none.toml")),
        ("cnn1 cannot take 3x8x8", (*small, "--model.pool", "cnn1", "--run.dir", "new")),
        ("is damaged", ("restart", str(damaged))),
    ):
        told(program(2, *arguments, cwd=tmp_path, mpi=mpi), pattern)
    assert (digest(tmp_path), sorted(tmp_path.rglob("*"))) == before


def on_rank(number: int, code: str, folder: Path) -> dict[str, str]:
    """The environment in which that rank runs `code` before the program."""
    (folder / "site").mkdir()
    names = "os.environ.get('PMI_RANK'), os.environ.get('OMPI_COMM_WORLD_RANK')"
    text = f"import os\nif '{number}' in ({names}):\n    {code}\n"
    (folder / "site" / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])}


@BOTH
def test_the_message_survives_a_first_rank_that_is_late(tmp_path: Path, mpi: str) -> None:
    """Open MPI's launcher ends all ranks at the first non-zero exit."""
    late = on_rank(0, "import time; time.sleep(2)", tmp_path)
    told(program(2, "--rouns", "3", cwd=tmp_path, mpi=mpi, env=late), "no flag --rouns")


def test_a_configuration_that_one_host_does_not_have(small: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("rounds = 1\n")
    lost = on_rank(1, "os.chdir('/')", tmp_path)
    result = program(2, "c.toml", *small, "--run.dir", str(tmp_path / "new"), cwd=tmp_path, env=lost)
    told(result, "no configuration file c.toml")
    assert not (tmp_path / "new").exists()


def test_data_that_one_host_does_not_have(small: tuple[str, ...], tmp_path: Path) -> None:
    table(tmp_path / "d.h5", x=np.zeros((200, 3, 8, 8), np.uint8), y=np.arange(200) % 10)
    lost = on_rank(1, f"import h5py; h5py.File = lambda *_, **__: open('{tmp_path}/none')", tmp_path)
    flags = ("--data.source", "hdf5", "--data.path", "d.h5", "--run.dir", "new")
    told(program(2, *small, *flags, cwd=tmp_path, env=lost), "d.h5 cannot be opened")
    assert not (tmp_path / "new").exists()


def test_the_history_is_untouched_by_a_refused_restart(session: Session, run: Path, tmp_path: Path) -> None:
    rows = (run / "metrics.jsonl").read_text()
    told(session("restart", str(run), "--seed", "3", cwd=tmp_path), "seed")
    assert (run / "metrics.jsonl").read_text() == rows and len(rows.splitlines()) == 3
    assert [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()] == [
        "start",
        "finish",
    ]
