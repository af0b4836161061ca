"""LEAF's folders, laid out as its `preprocess.sh` writes them: users as clients, parts, kinds of samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pfedmoe_mpi import config
from pfedmoe_mpi.data.sources.open import open_dataset
from pfedmoe_mpi.federation import effective, plan
from support.data_files import all_rows, data_error, open_data
from support.launcher import Result

Users = dict[str, tuple[list[Any], list[Any]]]


def write_part(folder: Path, users: Users, name: str = "all_data_niid_1_keep_0") -> Path:
    """Write one file as LEAF's `utils/split_data.py` does."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "users": list(users),
        "num_samples": [len(y) for _, y in users.values()],
        "user_data": {user: {"x": x, "y": y} for user, (x, y) in users.items()},
    }
    (folder / f"{name}_{folder.name}_9.json").write_text(json.dumps(content))
    return folder.parent


def femnist_users(rows: int, names: tuple[str, ...] = ("f0002_12", "f0001_41"), seed: int = 0) -> Users:
    draw = np.random.default_rng(seed)
    return {
        name: (draw.random((rows, 784)).round(3).tolist(), [[3, 10, 36][k % 3] for k in range(rows)])
        for name in names
    }


@pytest.fixture(scope="module")
def femnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("femnist") / "data"
    write_part(root / "train", femnist_users(9))
    write_part(root / "train", femnist_users(9, ("f0003_00",), 1), "all_data_1_niid_1_keep_0")
    write_part(root / "test", femnist_users(3, ("f0001_41", "f0002_12", "f0003_00"), 2))
    return root


def test_users_of_femnist_are_clients_with_their_official_test_part(femnist: Path) -> None:
    data = open_data("leaf", femnist)
    assert data.shape == (1, 28, 28) and data.class_names == ("3", "A", "small a")
    assert data.client_names == ("f0001_41", "f0002_12", "f0003_00") and not data.left_out
    assert data.proposals == {"partition.kind": "natural"} and not data.warnings
    x = all_rows(data).reshape(len(data), 784)
    written = femnist_users(9)["f0002_12"]
    rows = np.flatnonzero((data.client == 1) & ~data.official_test)
    assert np.array_equal(x[rows], np.array(written[0], np.float32))
    assert [{"3": 3, "A": 10, "small a": 36}[data.class_names[y]] for y in data.labels[rows]] == written[1]
    assert np.bincount(data.client[data.official_test]).tolist() == [3, 3, 3]


def test_femnist_trains_in_one_command(run_command: Callable[..., Result], femnist: Path) -> None:
    flags = ("--data.source", "leaf", "--data.path", str(femnist), "--rounds", "1", "--model.dim", "16")
    assert "0 f0001_41, 1 f0002_12, 2 f0003_00" in run_command(*flags, "--train.device", "cpu").out
    run_command("data", "prepare", "femnist.h5", *flags[:4])


def test_clients_without_enough_rows_are_left_out(tmp_path: Path) -> None:
    train = femnist_users(5) | femnist_users(1, ("short",)) | femnist_users(5, ("untested",))
    write_part(tmp_path / "train", train)
    data = open_data("leaf", write_part(tmp_path / "test", femnist_users(1)))
    assert data.client_names == ("f0001_41", "f0002_12") and len(data) == 12
    assert data.left_out == ("2 clients without 2 training rows and a test row, such as short",)
    assert data.proposals == {"partition.kind": "natural", "partition.min_samples": 6}


def test_a_split_by_users_has_no_official_test_part(tmp_path: Path) -> None:
    write_part(tmp_path / "train", femnist_users(12, ("9", "10")))
    data = open_data("leaf", write_part(tmp_path / "test", femnist_users(12, ("8",))))
    assert data.client_names == ("8", "9", "10") and data.official_test is None
    assert data.left_out == ("the official split, because no client is in both parts",)


def test_files_of_all_data_have_no_official_test_part(tmp_path: Path) -> None:
    write_part(tmp_path / "all_data", femnist_users(12))
    assert open_data("leaf", tmp_path / "all_data").official_test is None


def test_shakespeare_is_read_by_characters(tmp_path: Path) -> None:
    """A sample is 80 characters, its class the next one; windows overlap, so parts are cut from the end."""
    text = "But soft, what light through yonder window breaks? It is the east, and Juliet is the sun. " * 2
    windows = ([text[k : k + 80] for k in range(30)], [text[k + 80] for k in range(30)])
    users = {"THE_TRAGEDY_OF_ROMEO_AND_JULIET_ROMEO": windows, "ALL_S_WELL_HELENA": windows}
    root = write_part(tmp_path / "train", users)
    made = config.build({"data.source": "leaf", "data.path": str(root), "data.length": 12})
    data = open_dataset(made.data, 0, clients=2)
    assert data.left_out == ("the first 68 of 80 characters: data.length = 12",)
    assert [data.class_names[y] for y in data.labels[:30]] == windows[1]
    assert np.flatnonzero(data.official_test).tolist() == [*range(24, 30), *range(54, 60)]
    data_error("the class of a sample in .* is the next character", "leaf", root, tokens="word")
    partition = plan.draw_partition(effective.apply_proposals(made, data), data)
    tokens = all_rows(data.fitted(partition))
    trained = np.concatenate(partition.train)
    written = [character for row in trained for character in text[row % 30 + 68 : row % 30 + 80]]
    pairs = set(zip(written, tokens[trained].ravel().tolist(), strict=True))
    assert len(pairs) == len(set(written)) == len({token for _, token in pairs}), "a token per character"


def test_sent140_reads_the_words_of_the_tweet(tmp_path: Path) -> None:
    tweet = ["1467810369", "Mon Apr 06 22:19:45 PDT 2009", "NO_QUERY", "user", "So HAPPY today!"]
    other = [*tweet[:4], "so sad today"]
    users = {f"user{k}": ([tweet, other] * 6, [1, 0] * 6) for k in range(2)}
    data = open_data("leaf", write_part(tmp_path / "train", users), length=4)
    x = all_rows(data)
    assert data.class_names == ("0", "1") and data.tokens and not data.ordered
    assert (x[0] > 0).tolist() == [True, True, True, False]
    assert x[0, 0] == x[1, 0] and x[0, 2] == x[1, 2] and x[0, 1] != x[1, 1]


def test_celeba_reads_the_named_images(tmp_path: Path) -> None:
    folder = tmp_path / "raw" / "img_align_celeba"
    folder.mkdir(parents=True)
    for k in range(8):
        Image.new("RGB", (8, 10), (k, 2 * k, 3 * k)).save(folder / f"{k:06d}.png")
    names = [f"{k:06d}.png" for k in range(8)]
    users = {"2880": (names[:4], [0.0, 1.0, 0.0, 1.0]), "12": (names[4:], [1.0, 0.0, 0.0, 1.0])}
    data = open_data("leaf", write_part(tmp_path / "train", users), size=4)
    assert data.shape == (3, 4, 4) and data.client_names == ("12", "2880")
    assert all_rows(data)[:, 0, 0, 0].tolist() == list(range(8)) and data.labels[:2].tolist() == [0, 1]


GOOD = {"users": ["a"], "num_samples": [3], "user_data": {"a": {"x": [[1.0]] * 3, "y": [0, 1, 0]}}}


def changed(x: Any = None, y: Any = None, **content: Any) -> str:
    samples = {"x": x or GOOD["user_data"]["a"]["x"], "y": y or [0, 1, 0]}
    return json.dumps({**GOOD, "user_data": {"a": samples}, **content})


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("[" * 100_000, "is not JSON"),
        ("[]", "has no users, num_samples and user_data"),
        (changed(users=[["a"]]), "does not have num_samples"),
        (changed(num_samples=[4]), "'a' does not have num_samples = 4 samples x and y"),
        (changed(num_samples=[3, 3]), "users and num_samples do not fit"),
        (changed(users=["a", "a"], num_samples=[3, 3]), "a user is there twice"),
        (changed(user_data={"a": 3}), "'a' does not have num_samples = 3"),
        (changed(x=[[1.0], [1.0, 2.0], [1.0]]), "neither lists of as many numbers, texts nor tweets"),
        (changed(x=[[[1.0]]] * 3), "neither lists of as many numbers"),
        (changed(x=[[None]] * 3), "neither lists of as many numbers"),
        (changed(x=[["1"]] * 3), "neither lists of as many numbers"),
        (changed(x=[[10**400]] * 3), "neither lists of as many numbers"),
        (changed(x=[[1e300]] * 3), "holds a NaN or an infinity"),
        (changed(y=[0, 1.5, 0]), "labels that are not integers or texts"),
        (changed(y=[True, False, True]), "labels that are not integers or texts"),
        (changed(y=[[0], [1], [0]]), "labels that are not integers or texts"),
        (changed(x=["../../a.png"] * 3), "leads out of"),
        (changed(x=["a.png"] * 3), "there is no folder"),
        (changed(x=[[1.0]] * 2, y=[0, 1], num_samples=[2]), "only clients with fewer than 3 rows"),
        (changed().replace("1.0", "NaN", 1), "is not JSON"),
        (b'{"users": ["\xff"]}', "is not UTF-8"),
    ],
)
def test_hostile_leaf_file_is_one_clear_error(tmp_path: Path, content: str | bytes, pattern: str) -> None:
    (tmp_path / "train").mkdir()
    raw = content.encode() if isinstance(content, str) else content
    (tmp_path / "train" / "data.json").write_bytes(raw)
    data_error(pattern, "leaf", tmp_path)


def test_users_in_two_files_and_mixed_data_are_refused(tmp_path: Path, femnist: Path) -> None:
    write_part(tmp_path / "train", femnist_users(3))
    write_part(tmp_path / "train", femnist_users(3), "again")
    data_error("user 'f0002_12' is in .*again.* and in .*", "leaf", tmp_path)
    write_part(tmp_path / "train", {"b": ([[0.5]] * 4, [3, 10, 3, 10])}, "again")
    data_error("user 'f0002_12' has 784 numbers, and others have 1 numbers", "leaf", tmp_path)
    data_error("has no file train/", "leaf", femnist.parent)
