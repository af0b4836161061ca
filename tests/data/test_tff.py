"""TensorFlow Federated's HDF5: clients as groups in one file per part, as its simulation data sets are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pfedmoe_mpi.data import Dataset
from pfedmoe_mpi.errors import DataError
from support.data_files import all_rows, data_error, open_data, random_images
from support.launcher import Result

CLIENTS = ("f0000_14", "f0001_41", "f0002_12")


def write_clients(path: Path, clients: dict[str, dict[str, Any]], **storage: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, tables in clients.items():
            for key, table in tables.items():
                file.create_dataset(f"examples/{name}/{key}", data=table, **storage)
    return path


def emnist(rows: int, seed: int = 0, names: tuple[str, ...] = CLIENTS) -> dict[str, dict[str, Any]]:
    draw = np.random.default_rng(seed)
    labels = np.array([[3, 10, 36][k % 3] for k in range(rows)], np.int32)
    return {name: {"label": labels, "pixels": draw.random((rows, 28, 28), np.float32)} for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("emnist")
    write_clients(root / "fed_emnist_train.h5", emnist(9))
    write_clients(root / "fed_emnist_test.h5", emnist(3, 1))
    return root


def test_two_files_are_training_and_official_test_part(folder: Path) -> None:
    data = open_data("tff", folder)
    assert data.shape == (1, 28, 28) and data.name == "fed_emnist" and data.client_names == CLIENTS
    assert data.class_names == ("3", "A", "small a") and not data.left_out and not data.warnings
    for seed, rows, test in ((0, 9, False), (1, 3, True)):
        written = emnist(rows, seed)
        for k, name in enumerate(CLIENTS):
            mine = np.flatnonzero((data.client == k) & (data.official_test == test))
            assert np.array_equal(all_rows(data)[mine, 0], written[name]["pixels"])
            assert [[3, 10, 36][y] for y in data.labels[mine]] == written[name]["label"].tolist()


def test_federated_emnist_trains_in_one_command(run_command: Callable[..., Result], folder: Path) -> None:
    flags = ("--data.source", "tff", "--data.path", str(folder), "--rounds", "1", "--model.dim", "16")
    assert "0 f0000_14, 1 f0001_41, 2 f0002_12" in run_command(*flags, "--train.device", "cpu").out


def test_one_file_leaves_out_its_neighbour(folder: Path) -> None:
    data = open_data("tff", folder / "fed_emnist_train.h5")
    assert len(data) == 27 and data.official_test is None
    assert data.left_out == ("fed_emnist_test.h5, because data.path names one file",)


def test_cifar100_has_colours_and_other_test_clients(tmp_path: Path) -> None:
    """Its test clients do not train; names sort as numbers; coarse labels are not read."""
    x = random_images(4, 32, 32, 3)
    labels = {"label": np.array([7, 0, 99, 7]), "coarse_label": np.arange(4)}
    write_clients(
        tmp_path / "fed_cifar100_train.h5", {"10": {"image": x, **labels}, "9": {"image": x, **labels}}
    )
    write_clients(
        tmp_path / "fed_cifar100_test.h5", {"0": {"image": x, **labels}}, compression="gzip", chunks=True
    )
    data = open_data("tff", tmp_path)
    assert data.shape == (3, 32, 32) and data.client_names == ("0", "9", "10") and data.official_test is None
    assert data.class_names == ("0", "7", "99") and data.labels[:4].tolist() == [1, 0, 2, 1]
    assert np.array_equal(all_rows(data)[:4], x.transpose(0, 3, 1, 2))
    assert data.left_out == ("the official split, because no client is in both parts",)


X, Y = np.zeros((4, 2, 2), np.float32), np.array([0, 1, 0, 1])


def change(**tables: Any) -> dict[str, dict[str, Any]]:
    return {
        "a": {key: table for key, table in ({"pixels": X, "label": Y} | tables).items() if table is not None}
    }


@pytest.mark.parametrize(
    ("clients", "pattern"),
    [
        ({}, "has no group 'examples'"),
        (change(label=None), "has no dataset 'examples/a/label'"),
        (change(pixels=None), "has no dataset 'examples/a/pixels'"),
        ({"a": {"tags": [b"To be"] * 4}}, "has no dataset 'examples/a/pixels'"),
        (change(label=Y[:3]), r"client 'a' has 4 images, and labels of int64 \(3,\)"),
        (change(label=Y + 0.5), "labels of float64"),
        (change(pixels=X.astype(np.int32)), "samples of int32 .* are not images"),
        (change(pixels=np.zeros((4, 2, 2, 2), np.float32)), r"images of shape \(2, 2, 2\)"),
        (change(pixels=X + np.nan), "holds a NaN or an infinity"),
        (change(pixels=X + np.float64(1e300)), "holds a NaN or an infinity"),
        (change() | {"b": {"pixels": X[:, :1], "label": Y}}, "client 'b' has float32 .*, others float32"),
    ],
)
def test_bad_file_is_one_clear_error(tmp_path: Path, clients: dict[str, Any], pattern: str) -> None:
    data_error(pattern, "tff", write_clients(tmp_path / "a.h5", clients))


def test_links_and_claims_are_refused(tmp_path: Path) -> None:
    good = write_clients(tmp_path / "good.h5", change())
    for name, link in {
        "soft": h5py.SoftLink("/examples/a"),
        "external": h5py.ExternalLink(str(good), "/examples/a"),
        "dataset": X,
    }.items():
        path = write_clients(tmp_path / f"{name}.h5", change())
        with h5py.File(path, "r+") as file:
            file["examples"]["b"] = link
        data_error("examples/b is not a group", "tff", path)
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file["examples"] = h5py.ExternalLink(str(good), "/examples")
    data_error("examples is not a group of this file", "tff", tmp_path / "whole.h5")
    with h5py.File(tmp_path / "large.h5", "w") as file:
        for name in "abcde":  # each alone is plausible
            file.create_dataset(f"examples/{name}/pixels", (4, 2000, 2000), np.float32, chunks=(1, 200, 200))
            file[f"examples/{name}/label"] = Y
    data_error("claims to unpack to far more than its length", "tff", tmp_path / "large.h5")
    data_error("has 0 files", "tff", tmp_path)
    data_error("has no dataset 'x'(.|\n)*--data.source tff", "hdf5", good)


def test_damaged_files_are_data_errors(tmp_path: Path) -> None:
    path = write_clients(tmp_path / "a.h5", change())
    raw, draw = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(raw)
        for place in draw.integers(0, len(raw), 4):
            damaged[place] = draw.integers(256)
        path.write_bytes(damaged[: None if draw.random() < 0.9 else draw.integers(len(raw))])
        with suppress(DataError):
            open_data("tff", path)


# Texts

ROMEO = "But, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun."
HELENA = "Our remedies oft in ourselves do lie,\nWhich we ascribe to heaven: the fated sky"


def write_texts(path: Path, texts: dict[str, str], key: str = "snippets", **storage: Any) -> Path:
    lines = {name: np.array(text.split("\n"), dtype=object) for name, text in texts.items()}
    kind = h5py.string_dtype()
    return write_clients(path, {name: {key: text} for name, text in lines.items()}, dtype=kind, **storage)


def windows_of(data: Dataset, client: int, test: bool) -> list[str]:
    """Return the characters of every row before the fit, with the next one behind them."""
    numbers = sorted({*ROMEO, *HELENA, *"Ay."})
    mine = np.flatnonzero((data.client == client) & (data.official_test == test))
    x = all_rows(data)[mine]
    return [
        "".join(numbers[n - 1] for n in row) + data.class_names[y]
        for row, y in zip(x, data.labels[mine], strict=True)
    ]


def test_shakespeares_snippets_are_windows_of_characters(tmp_path: Path) -> None:
    """Each part's snippets are one text; a class is the next character, capital letters and breaks too."""
    write_texts(tmp_path / "shakespeare_train.h5", {"ROMEO": ROMEO, "HELENA": HELENA, "PAGE": "Ay."})
    write_texts(tmp_path / "shakespeare_test.h5", {"ROMEO": HELENA, "HELENA": ROMEO})
    data = open_data("tff", tmp_path, length=12)
    assert data.client_names == ("HELENA", "ROMEO") and data.ordered and data.tokens
    assert data.left_out == ("1 clients without 2 training rows and a test row, such as PAGE",)
    for client, train, test in ((0, HELENA, ROMEO), (1, ROMEO, HELENA)):
        for text, part in ((train, False), (test, True)):
            expected = [text[k : k + 13] for k in range(len(text) - 12)]
            assert windows_of(data, client, part) == expected
    assert "\n" in data.class_names and data.proposals["partition.kind"] == "natural"
    single = open_data("tff", tmp_path / "shakespeare_train.h5", length=12)
    assert single.official_test is not None and 0.1 < single.official_test.mean() < 0.3
    words = open_data("tff", tmp_path, length=3, tokens="word")
    assert "yonder" in words.class_names


def test_stack_overflow_is_read_by_words(tmp_path: Path) -> None:
    posts = {"1": "how do i sort a list\nuse the key of sort", "2": "what is a list of a list\nsee above"}
    path = write_texts(tmp_path / "stackoverflow_train.h5", posts, "tokens")
    data = open_data("tff", path, length=2)
    assert data.class_names == ("a", "above", "i", "key", "list", "of", "see", "sort", "the", "use")
    assert data.client is not None and np.bincount(data.client).tolist() == [9, 7]


def test_shakespeare_trains_in_one_command(run_command: Callable[..., Result], tmp_path: Path) -> None:
    write_texts(tmp_path / "shakespeare_train.h5", {"ROMEO": ROMEO * 2, "HELENA": HELENA * 2})
    write_texts(tmp_path / "shakespeare_test.h5", {"ROMEO": ROMEO[::-1], "HELENA": HELENA[::-1]})
    flags = ("--data.source", "tff", "--data.path", str(tmp_path), "--data.length", "8", "--rounds", "1")
    assert "0 HELENA, 1 ROMEO" in run_command(*flags, "--model.dim", "16", "--train.device", "cpu").out


def test_bad_texts_are_refused(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.h5", {"a": ROMEO, "b": HELENA})
    data_error("has only clients with fewer than 3 rows(.|\n)*lower --data.length", "tff", path, length=500)
    with h5py.File(path, "r+") as file:
        file["examples/c/pixels"], file["examples/c/label"] = X, Y
    data_error("client 'a' has a text, and others have images", "tff", path)
    bad = write_clients(tmp_path / "b.h5", {"a": {"snippets": np.arange(5)}})
    data_error(r"snippets of .* is int64 of shape \(5,\), not texts", "tff", bad)
    bad = write_clients(tmp_path / "c.h5", {"a": {"snippets": np.array([b"\xff\xfe" * 40])}})
    data_error("c.h5", "tff", bad)
