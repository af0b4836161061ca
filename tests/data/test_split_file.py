"""Splits that a file lists: of `data partition`, written by hand, or converted from FL-bench's pickles."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pfedmoe_mpi.commands.data import write_partition
from pfedmoe_mpi.config import Config, build
from pfedmoe_mpi.data import Dataset, Partition
from pfedmoe_mpi.data.split_file import read_split
from pfedmoe_mpi.errors import ConfigError, DataError, PartitionError, UserError
from pfedmoe_mpi.federation import effective, plan
from support.data_files import open_data, write_h5
from support.launcher import Session, checkpoint_digest, read_metrics, run_to_end
from support.paths import ROOT

ROWS = 120
LABELS = np.arange(ROWS) % 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """120 rows of four classes."""
    x = np.random.default_rng(0).random((ROWS, 5), np.float32)
    return open_data("hdf5", write_h5(tmp_path_factory.mktemp("data") / "d.h5", x=x, y=LABELS))


def split_of(data: Dataset, file: Path, **settings: Any) -> tuple[Config, Partition]:
    """Return the settings and the partition of a run with this file."""
    given = {"partition.file": str(file), **{name.replace("__", "."): v for name, v in settings.items()}}
    config = effective.apply_proposals(effective.with_listed(build(given)), data)
    return config, plan.draw_partition(config, data)


def written(path: Path, tree: Any) -> Path:
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def test_partition_that_was_written_is_the_partition_of_the_run(tmp_path: Path) -> None:
    drawn = build(
        {"clients": 7, "partition.kind": "pathological", "partition.validation": 0.2, "unseen.clients": 2}
    )
    write_partition(drawn, tmp_path / "p.h5")
    digits = open_data("digits")
    config, read = split_of(digits, tmp_path / "p.h5", seed=5)
    before = plan.draw_partition(drawn, digits)
    assert read.digest() == before.digest() and read.unseen == before.unseen
    assert (config.clients, config.unseen_clients, config.partition.kind) == (7, 2, "file")
    again = effective.effective_config(config, digits, 1)
    assert plan.draw_partition(again, digits).digest() == read.digest(), "a restart has every setting"


def test_rows_of_the_server_and_names_of_clients_are_kept(tmp_path: Path) -> None:
    reserving = {"algorithm": "fedjets", "clients": 5}
    write_partition(build(reserving), tmp_path / "p.h5")
    digits = open_data("digits")
    _, read = split_of(digits, tmp_path / "p.h5", algorithm="fedjets")
    assert len(read.reserved) > 10 and read.digest() == plan.draw_partition(build(reserving), digits).digest()
    write_partition(build({"clients": 5}), tmp_path / "q.h5")
    with pytest.raises(
        PartitionError, match=r"reserves rows[\s\S]+data partition OUT.h5 --algorithm fedjets"
    ):
        split_of(digits, tmp_path / "q.h5", algorithm="fedjets")
    named = {"north": list(range(60)), "2": list(range(60, 90)), "10": list(range(90, 120))}
    names = split_of(open_data("digits"), written(tmp_path / "n.json", named))[1].client_names
    assert names == ("10", "2", "north"), "texts sort as texts"
    write_partition(build({"partition.file": str(tmp_path / "n.json")}), tmp_path / "n.h5")
    assert split_of(digits, tmp_path / "n.h5")[1].client_names == names


def test_lists_of_one_set_are_divided_by_the_test_fraction(data: Dataset, tmp_path: Path) -> None:
    clients = [list(range(0, 40)), list(range(60, 120))]
    file = written(tmp_path / "s.json", clients)
    config, split = split_of(data, file, partition__test_fraction=0.25, partition__validation=0.2)
    assert config.clients == 2
    for client, rows in enumerate(clients):
        parts = (split.train[client], split.validation[client], split.test[client])
        assert sorted(np.concatenate(parts).tolist()) == rows
        assert len(parts[2]) == len(rows) / 4 and len(parts[1]) == round(0.2 * len(rows) * 3 / 4)
        assert np.bincount(LABELS[parts[2]], minlength=4).min() > 0, "every class has test rows"
    official = replace(data, official_test=np.arange(ROWS) % 10 == 0)
    _, split = split_of(official, file, partition__pool="official")
    assert split.test[1].tolist() == list(range(60, 120, 10))
    with pytest.raises(PartitionError, match="official"):
        split_of(data, file, partition__pool="official")


@pytest.mark.parametrize("validation", ["validation", "val", "valid"])
def test_listed_parts_are_the_parts(data: Dataset, tmp_path: Path, validation: str) -> None:
    parts = {"train": [9, 2, 30, 31, 32, 33, 34, 35], validation: [4], "test": [7, 1]}
    other = {"train": list(range(40, 50)), validation: [], "test": [60]}
    _, split = split_of(data, written(tmp_path / "s.json", [parts, other]))
    assert split.train[0].tolist() == sorted(parts["train"]) and split.test[0].tolist() == [1, 7]
    assert split.validation[0].tolist() == [4] and not len(split.validation[1])
    for setting in ({"partition__test_fraction": 0.3}, {"partition__validation": 0.1}):
        with pytest.raises(PartitionError, match="has no effect"):
            split_of(data, tmp_path / "s.json", **setting)


def documented(program: str) -> list[str]:
    """Return the command of the README that calls a program."""
    text = (ROOT / "pfedmoe_mpi" / "data" / "README.md").read_text()
    command = re.search(rf"^    (python -c \"import json, {program}.*)$", text, re.M)
    assert command
    return [sys.executable, *shlex.split(command[1])[1:]]


def test_partition_of_fl_bench_is_read_after_the_documented_conversion(data: Dataset, tmp_path: Path) -> None:
    """Its `generate_data.py` pickles this object: arrays of numpy in dictionaries by client."""
    rows = np.random.default_rng(1).permutation(ROWS).astype(np.int32)
    parts = [{"train": r[10:], "val": r[5:10], "test": r[:5]} for r in np.split(rows, 4)]
    everyone = list(range(4))
    separation = {"train": everyone, "val": everyone, "test": everyone, "total": 4}
    (tmp_path / "partition.pkl").write_bytes(
        pickle.dumps({"separation": separation, "data_indices": parts, "val": []})
    )
    with pytest.raises(DataError, match="pickle, which is never read"):
        split_of(data, tmp_path / "partition.pkl")
    subprocess.run(documented("pickle"), cwd=tmp_path, check=True, timeout=60)
    _, split = split_of(data, tmp_path / "split.json")
    for client, part in enumerate(parts):
        assert split.train[client].tolist() == sorted(part["train"])
        assert split.validation[client].tolist() == sorted(part["val"])
        assert split.test[client].tolist() == sorted(part["test"])


BAD: dict[str, Any] = {
    "row 120, but the data have rows 0 to 119": [[0, 1, 2], [120]],
    "row 2 is listed for client 0 and for client 1": [[0, 1, 2], [2, 3]],
    "row 1 is listed for client 0 and for client 0": [{"train": [0, 1], "test": [1]}],
    "client 1 has no training rows": [[0, 1, 2], []],
    "client 1 has no test rows": [{"train": [0, 1], "test": [2]}, {"train": [3, 4]}],
    "clients = 3, but partition.file": {"clients": 3},
    "client 1 of .* has 2 rows, fewer than partition.min_samples = 10": [list(range(20)), [30, 31]],
}


@pytest.mark.parametrize("message", BAD)
def test_list_that_does_not_fit_is_refused(data: Dataset, tmp_path: Path, message: str) -> None:
    settings: dict[str, Any] = BAD[message] if isinstance(BAD[message], dict) else {}
    tree = [list(range(20)), list(range(20, 40))] if settings else BAD[message]
    with pytest.raises(PartitionError, match=message):
        split_of(data, written(tmp_path / "s.json", tree), **settings)


@pytest.mark.parametrize(
    "tree",
    [
        7,
        [],
        {},
        [7],
        [[True]],
        [[-1]],
        [[1.5]],
        [["1"]],
        [{"tran": [1]}],
        [{"val": [1], "valid": [2]}],
        [[2**70]],
    ],
)
def test_json_that_is_not_a_split_is_refused(tmp_path: Path, tree: Any) -> None:
    with pytest.raises(DataError, match=r"partition.file = .*s.json[\s\S]+remedy: write it"):
        read_split(written(tmp_path / "s.json", tree))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    for text in ("[[1, 2", "[" * 100_000, "\udcff", '{"a": [1], "\\ud800": [2]}'):
        (tmp_path / "s.json").write_text(text, errors="surrogateescape")
        with pytest.raises(DataError, match=r"s\.json"):
            read_split(tmp_path / "s.json")
    with pytest.raises(DataError, match="no such file"):
        read_split(tmp_path / "none.json")
    write_partition(build({"clients": 4}), tmp_path / "p.h5")
    whole = (tmp_path / "p.h5").read_bytes()
    changes: list[tuple[str, Any]] = [
        ("train/offsets", [0, 5, 3, 9, 9]),
        ("train/rows", np.zeros(3)),
        ("unseen", [9]),
        ("test/offsets", [0, 1]),
    ]
    for name, values in changes:
        (tmp_path / "q.h5").write_bytes(whole)
        with h5py.File(tmp_path / "q.h5", "a") as file:
            del file[name]
            file[name] = values
        with pytest.raises(UserError, match=re.escape(str(tmp_path / "q.h5"))):
            read_split(tmp_path / "q.h5")
    (tmp_path / "q.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=re.escape("q.h5")):
        read_split(tmp_path / "q.h5")


def test_split_of_other_data_is_refused(data: Dataset, tmp_path: Path) -> None:
    write_partition(build({"clients": 4}), tmp_path / "p.h5")
    with pytest.raises(PartitionError, match="other labels"):
        split_of(data, tmp_path / "p.h5")


def test_settings_of_a_drawn_partition_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"partition.alpha = 0.5 has no effect"):
        build({"partition.file": "s.json", "partition.alpha": 0.5})
    with pytest.raises(ConfigError, match=r"no effect with partition.kind = iid"):
        build({"partition.file": "s.json", "partition.kind": "iid"})
    with pytest.raises(ConfigError, match=r"partition.file is empty"):
        build({"partition.kind": "file"})


def test_runs_with_the_drawn_and_the_listed_split_are_the_same(session: Session, tmp_path: Path) -> None:
    """One run draws on one rank, the other reads the file on three, moves it, and restarts."""
    small = ("--rounds", "2", "--model.pool", "mlp4,mlp5", "--model.shared", "mlp5", "--run.dir")
    drawn = ("--clients", "4", "--unseen.clients", "1", "--partition.kind", "pathological")
    assert session("data", "partition", "p.h5", *drawn, cwd=tmp_path).code == 0
    assert session(*drawn, *small, "one", cwd=tmp_path).code == 0
    tuned = ("--unseen.tune", "2", "--unseen.shots", "5")
    run_to_end(3, "--partition.file", "p.h5", *tuned, *small, "three", cwd=tmp_path)
    assert checkpoint_digest(tmp_path / "one", 2) == checkpoint_digest(tmp_path / "three", 2)
    here = session("evaluate", "one/checkpoints/round-000002.h5", *tuned, "--json", cwd=tmp_path)
    rows = json.loads(here.out), read_metrics(tmp_path / "three")[-1]
    assert rows[0]["accuracy_tuned"]["mean"] == rows[1]["accuracy_tuned"]["mean"] is not None
    (tmp_path / "p.h5").rename(tmp_path / "moved.h5")
    lost = session("restart", "three", "--rounds", "3", cwd=tmp_path)
    assert lost.code == 2 and "no such file" in lost.err
    moved = session("restart", "three", "--rounds", "3", "--partition.file", "moved.h5", cwd=tmp_path)
    assert moved.code == 0, moved.err
    assert session("data", "partition", "other.h5", *drawn, "--seed", "1", cwd=tmp_path).code == 0
    other = session("restart", "three", "--rounds", "4", "--partition.file", "other.h5", cwd=tmp_path)
    assert other.code == 2 and "changed since the checkpoint" in other.err
