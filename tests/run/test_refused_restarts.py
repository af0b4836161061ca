"""Damaged checkpoints, and restarts that would be another run, are refused and write nothing."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pfedmoe_mpi.checkpoint.writer import _put
from support.checkpoint_files import read_ranges, reseal
from support.files import flip_bit, path_digest
from support.launcher import Result, Session, error_message, read_events

# Damaged checkpoints


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def unseal(path: Path) -> None:
    """Make a file that was renamed before it was sealed: HDF5 is complete, the user block is empty."""
    with open(path, "r+b") as file:
        file.write(bytes(4096))


def another_format(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(struct.pack("<I", 77))


def first_half(path: Path) -> None:
    flip_bit(path, path.stat().st_size // 2)


def spoil(path: Path, name: str) -> None:
    offset, length = read_ranges(path)[0][name]
    flip_bit(path, offset + length // 2)


def cut_into(path: Path, name: str) -> None:
    os.truncate(path, read_ranges(path)[0][name][0] + 5)


def relinked(file: Any) -> None:
    """Replace the configuration by a link; `reseal` computes a valid seal."""
    del file["config"]
    file["config"] = h5py.ExternalLink("other.h5", "/config")


DAMAGE: list[tuple[str, Callable[[Path], object]]] = [
    ("no checkpoint|no run folder or checkpoint", Path.unlink),
    ("is truncated", truncate),
    ("not a finished checkpoint", lambda path: path.write_bytes(b"")),
    ("not a finished checkpoint", lambda path: path.write_text("rounds = 3")),
    ("not a finished checkpoint", unseal),
    ("format version 77", another_format),
    ("its seal does not match", lambda path: flip_bit(path, 40)),
    ("is damaged", first_half),
    ("HDF5's own structure has changed", lambda path: flip_bit(path, 4096 + 100)),
    ("the bytes of clients/000002 have changed", lambda path: spoil(path, "clients/000002")),
    ("the bytes of server/state have changed", lambda path: spoil(path, "server/state")),
    ("the bytes of config have changed", lambda path: spoil(path, "config")),
    ("the first incomplete part is clients/000003", lambda path: cut_into(path, "clients/000003")),
    ("config is a link", lambda path: reseal(path, relinked)),
    ("round is not a natural number", lambda path: reseal(path, lambda file: file.attrs.pop("round"))),
    ("is damaged", lambda path: flip_bit(path, path.stat().st_size - 1)),
]


@pytest.mark.parametrize(("pattern", "damage"), DAMAGE)
def test_restart_refuses_damaged_checkpoints(
    assert_refused: Callable[..., str], run: Path, pattern: str, damage: Callable[[Path], object]
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
        assert_refused(pattern, *arguments)


@pytest.mark.parametrize(
    ("says", "damage"),
    [
        ("the bytes of clients/000001 have changed", lambda path: spoil(path, "clients/000001")),
        ("the first incomplete part is server/state", lambda path: cut_into(path, "server/state")),
        ("config is a link; it must be stored in this file", lambda path: reseal(path, relinked)),
    ],
)
def test_restart_uses_the_last_good_checkpoint_and_says_why(
    run_command: Callable[..., Result], run: Path, says: str, damage: Callable[[Path], object]
) -> None:
    damage(run / "checkpoints" / "round-000003.h5")
    result = run_command("restart", run)
    assert result.err.startswith("warning: ") and says in result.err and "round-000003.h5" in result.err
    restart = read_events(run)[2]
    assert restart["checkpoint"] == "round-000002.h5" and says in restart["warnings"][0]


def test_flipped_bit_anywhere_is_detected(session: Session, run: Path, tmp_path: Path) -> None:
    """One byte is flipped in each of 60 stretches of the file, except the unused rest of the user block."""
    path = run / "checkpoints" / "round-000003.h5"
    good = path.read_bytes()
    random = np.random.default_rng(4)
    for first, last in [
        (0, 200),
        *((a, a + len(good) // 60) for a in range(4096, len(good), len(good) // 60)),
    ]:
        place = int(random.integers(first, min(last, len(good))))
        flip_bit(path, place)
        error_message(session("inspect", str(path), cwd=tmp_path), "checkpoint|damaged|truncated|format")
        path.write_bytes(good)
    assert session("inspect", str(path), cwd=tmp_path).code == 0


def test_restart_without_a_checkpoint_is_refused(
    assert_refused: Callable[..., str], run: Path, tmp_path: Path
) -> None:
    assert_refused("no run folder or checkpoint", "restart", "none")
    (tmp_path / "empty").mkdir()
    assert_refused("not a run folder", "restart", "empty")
    (run / "config.toml").unlink()
    for path in (run / "checkpoints").glob("round*"):
        truncate(path)
    assert "config.toml" in assert_refused("no configuration file", "restart", run)


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
        (r"no flag --sed\n  remedy: use --seed$", ["--sed", "1"]),
    ],
)
def test_restart_refuses_changed_settings(
    assert_refused: Callable[..., str], run: Path, pattern: str, arguments: list[str]
) -> None:
    assert_refused(pattern, "restart", run, "--rounds", "4", *arguments)
    for path in (run / "checkpoints").glob("*.h5"):
        path.unlink()
    # Without a checkpoint, the settings before are those of config.toml.
    assert_refused(pattern, "restart", run, "--rounds", "4", *arguments)


def test_restart_refuses_changed_data(
    assert_refused: Callable[..., str], session: Session, small_run: tuple[str, ...], tmp_path: Path
) -> None:
    made = session("data", "prepare", "d.h5", *small_run, cwd=tmp_path)
    assert made.code == 0, made.err
    flags = (*small_run, "--data.source", "hdf5", "--data.path", "d.h5", "--run.dir", "run")
    assert session(*flags, cwd=tmp_path).code == 0
    moved = tmp_path / "elsewhere.h5"
    (tmp_path / "d.h5").rename(moved)
    assert_refused("d.h5", "restart", "run", "--rounds", "2")
    with h5py.File(moved, "r+") as file:
        file["x"][7, 0, 0, 0] ^= 1
    assert_refused(
        "the data changed .*digest [0-9a-f]+… then, [0-9a-f]+… now", "restart", "run", "--data.path", moved
    )
    with h5py.File(moved, "r+") as file:
        file["x"][7, 0, 0, 0] ^= 1
    result = session("restart", "run", "--data.path", str(moved), "--rounds", "2", cwd=tmp_path)
    assert result.code == 0, "the same data in another place: " + result.err


def test_restart_from_an_older_checkpoint_needs_a_folder(
    assert_refused: Callable[..., str], run: Path, tmp_path: Path
) -> None:
    older, best = (run / "checkpoints" / name for name in ("round-000002.h5", "best.h5"))
    for path in (older, best):
        assert "--run.dir" in assert_refused("not the newest checkpoint", "restart", path)
        assert_refused("not the newest checkpoint", "restart", path, "--run.dir", run)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    assert_refused("is not empty and not a run folder", "restart", older, "--run.dir", "used")
    alone = tmp_path / "alone" / "round-000003.h5"
    alone.parent.mkdir()
    shutil.copy(run / "checkpoints" / "round-000003.h5", alone)
    assert_refused("not the newest checkpoint of a run folder", "restart", alone)
    moved = run.rename(tmp_path / "moved")
    assert_refused("not the newest checkpoint", "restart", moved / "checkpoints" / "round-000002.h5")


def test_restart_of_a_finished_run_changes_nothing(session: Session, run: Path, tmp_path: Path) -> None:
    before = path_digest(run)
    for source in (run, run / "checkpoints" / "round-000003.h5"):
        result = session("restart", str(source), cwd=tmp_path)
        assert (result.code, result.err) == (0, "") and "the run is finished: 3 of 3 rounds" in result.out
    assert path_digest(run) == before
    newest = str(run / "checkpoints" / "round-000003.h5")
    for words, named in (
        ([str(run), "--train.lr", "0.01"], "train.lr"),
        ([newest, "--run.dir", "new"], "--run.dir"),
    ):
        message = error_message(session("restart", *words, cwd=tmp_path), f"so {named} has no effect")
        assert "--rounds 6" in message
    assert path_digest(run) == before and not (tmp_path / "new").exists()


def test_evaluate_refuses_data_the_models_cannot_take(
    assert_refused: Callable[..., str], run: Path, tmp_path: Path
) -> None:
    source = run / "checkpoints" / "best.h5"
    path = tmp_path / "d.h5"
    with h5py.File(path, "w") as file:
        file["x"], file["y"] = np.zeros((200, 3, 8, 8), np.uint8), np.arange(200) % 3
    assert_refused(
        "do not take samples of 3×8×8 in 3 classes",
        "evaluate",
        source,
        "--data.source",
        "hdf5",
        "--data.path",
        path,
    )
    assert_refused("clients: 4 → 5", "evaluate", source, "--clients", "5")
    assert_refused("algorithm: pfedmoe → fedavg", "evaluate", source, "--algorithm", "fedavg")


def test_refused_restart_keeps_the_history(session: Session, run: Path, tmp_path: Path) -> None:
    rows = (run / "metrics.jsonl").read_text()
    error_message(session("restart", str(run), "--seed", "3", cwd=tmp_path), "seed")
    assert (run / "metrics.jsonl").read_text() == rows and len(rows.splitlines()) == 3
    assert [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()] == [
        "start",
        "finish",
    ]


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("its models are not those of its configuration", lambda config: config["model"].update(dim=64)),
        ("its models are not those of", lambda config: config["model"].update(pool=["mlp5", "mlp3"])),
        ("no setting 'nonsense'", lambda config: config.update(nonsense=1)),
        ("train", lambda config: config.update(train=5)),
        ("algorithm", lambda config: config.update(algorithm="nothing")),
    ],
)
def test_crafted_configuration_is_refused(
    assert_refused: Callable[..., str], run: Path, says: str, change: Callable[[Any], object]
) -> None:
    path = run / "checkpoints" / "round-000003.h5"

    def edit(file: Any) -> None:
        config = json.loads(bytes(file["config"][()]))
        change(config)
        del file["config"]
        _put(file, "config", np.array(json.dumps(config).encode()))

    reseal(path, edit)
    assert_refused(says, "restart", path, "--rounds", "4")
