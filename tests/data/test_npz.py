"""npz files of users: what is read from them, and the messages about unusable ones."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfedmoe_mpi.data.sources.safe_pickle import read_arrays
from pfedmoe_mpi.errors import DataError
from support.data_files import (
    GOOD_X,
    GOOD_Y,
    NAN,
    all_rows,
    client_arrays,
    data_error,
    open_data,
    random_images,
    shared_data,
    write_npz_clients,
)


def test_npz_reads_mnist_clients() -> None:
    path = shared_data("mnist-20clients")
    data = open_data("npz", path)
    assert (data.shape, data.classes, data.dtype, len(data)) == ((1, 28, 28), 10, np.float32, 70_000)
    assert data.mean == () and data.client is not None and data.official_test is not None
    with np.load(path / "test" / "7.npz", allow_pickle=True) as archive:
        real = archive["data"].tolist()
    mine = np.flatnonzero((data.client == 7) & data.official_test)
    assert np.array_equal(data.rows(mine), real["x"]) and np.array_equal(data.labels[mine], real["y"])


def test_npz_keeps_each_clients_train_and_test(tmp_path: Path) -> None:
    parts = [client_arrays(n, seed=n) for n in (6, 3, 5, 4)]
    write_npz_clients(tmp_path, "train", {0: parts[0], 1: parts[2]})
    write_npz_clients(tmp_path, "test", {0: parts[1], 1: parts[3]})
    data = open_data("npz", tmp_path)
    assert data.client is not None and data.official_test is not None
    assert data.client.tolist() == [0] * 9 + [1] * 9
    assert np.flatnonzero(data.official_test).tolist() == [6, 7, 8, 14, 15, 16, 17]
    assert np.array_equal(all_rows(data), np.concatenate([part["x"] for part in parts]))
    assert np.array_equal(data.labels, np.concatenate([part["y"] for part in parts]))


def test_npz_labels_may_differ_in_integer_type(tmp_path: Path) -> None:
    for client, dtype in enumerate((np.uint64, np.int64)):
        content = {"x": GOOD_X, "y": GOOD_Y.astype(dtype)}
        write_npz_clients(tmp_path, "train", {client: content})
    assert open_data("npz", tmp_path).labels.tolist() == [*GOOD_Y, *GOOD_Y]


def test_npz_accepts_plain_arrays_without_test(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    np.savez(tmp_path / "train" / "0.npz", x=random_images(6, 5, 5), y=GOOD_Y.astype(np.uint64))
    data = open_data("npz", tmp_path)
    assert (data.shape, data.dtype, data.official_test) == ((1, 5, 5), np.uint8, None)
    assert np.array_equal(all_rows(data)[:, 0], random_images(6, 5, 5))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_npz_reads_pickled_arrays_of_every_type(protocol: int) -> None:
    table: dict[str, Any] = {
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(4, dtype=">i4"),
        "bool": np.array([True, False]),
        "empty": np.empty((0, 3), np.float32),
        "number": np.float64(2.5),
        "list": [1, (2, "three"), {"four": None}],
    }
    found = read_arrays(pickle.dumps(np.array(table, dtype=object), protocol), "here")
    assert sorted(found) == ["big", "bool", "empty", "fortran"]
    for name, array in found.items():
        assert np.array_equal(array, table[name]) and array.shape == np.shape(table[name])


class Evil:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_npz_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for function, named in ((Path.touch, "touch|getattr|Path"), (eval, "builtins.eval")):
        argument = mark if function is Path.touch else f"open({str(mark)!r}, 'w')"
        content = {**client_arrays(6), "z": Evil(function, argument)}
        data_error(
            f"holds a pickled .*({named})", "npz", write_npz_clients(tmp_path / "d", "train", {0: content})
        )
    assert not mark.exists()


def test_npz_pickle_with_numpy_functions_is_refused(tmp_path: Path) -> None:
    for evil in (Evil(np.fromfile, "/dev/null"), Evil(np.memmap, "x"), np.ma.masked_array([1]), np.polyval):
        content = {**client_arrays(6), "z": evil}
        data_error("holds a pickled numpy", "npz", write_npz_clients(tmp_path, "train", {0: content}))


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ({"x": GOOD_X}, "no arrays x and y; it has x"),
        ({"x": GOOD_X, "y": [0, 1, 2, 0, 1, 2]}, "no arrays x and y"),
        ({1, 2}, "not one dict"),
        ({"x": GOOD_X, "y": GOOD_Y[:3]}, "6 samples, but labels"),
        ({"x": GOOD_X, "y": GOOD_Y / 2}, "6 samples, but labels of float64"),
        ({"x": NAN, "y": GOOD_Y}, "0.npz: row 4 holds a NaN"),
        ({"x": GOOD_X.astype(np.int32), "y": GOOD_Y}, "is int32"),
        ({"x": GOOD_X, "y": GOOD_Y + 1}, "subtract 1"),
        ({"x": np.array(["a"] * 6), "y": GOOD_Y}, "unsupported dtype"),
        ({"x": np.array([[{}]] * 6), "y": GOOD_Y}, "no arrays x and y; it has y"),
    ],
)
def test_unusable_npz_is_refused(tmp_path: Path, content: Any, pattern: str) -> None:
    data_error(pattern, "npz", write_npz_clients(tmp_path, "train", {0: content}))


def test_unusable_npz_folder_is_refused(tmp_path: Path) -> None:
    data_error("has no train/0.npz", "npz", tmp_path)
    write_npz_clients(tmp_path, "train", {0: client_arrays(6), 2: client_arrays(6)})
    data_error("has no train/1.npz", "npz", tmp_path)
    write_npz_clients(tmp_path, "train", {1: {"x": random_images(6, 1, 5, 5), "y": GOOD_Y}})
    data_error(r"x of client 1 is uint8 \(1, 5, 5\), of client 0 float32 \(1, 4, 4\)", "npz", tmp_path)
    write_npz_clients(tmp_path, "train", {1: client_arrays(6)})
    write_npz_clients(tmp_path, "test", {5: client_arrays(6)})
    data_error("test/5.npz without a train part", "npz", tmp_path)


@pytest.mark.parametrize("part", ["train", "test"])
def test_two_npz_files_of_one_client_are_refused(tmp_path: Path, part: str) -> None:
    """1 and 01 are the same number; numbers with leading zeros alone are accepted."""
    for folder in ("train", "test"):
        write_npz_clients(tmp_path, folder, {"00": client_arrays(6), "01": client_arrays(6)})
    data = open_data("npz", tmp_path)
    assert data.client is not None and data.client.tolist() == [0] * 12 + [1] * 12
    write_npz_clients(tmp_path, part, {"1": client_arrays(6)})
    data_error(rf"{part}/01.npz and .*{part}/1.npz are both client 1\n", "npz", tmp_path)
    (tmp_path / part / "1.npz").unlink()
    write_npz_clients(tmp_path, part, {"\u0661": client_arrays(6)})
    data_error("are both client 1\n", "npz", tmp_path)


def test_two_arrays_of_one_name_in_an_npz_file_are_refused(tmp_path: Path) -> None:
    path = write_npz_clients(tmp_path, "train", {0: client_arrays(6)}) / "train" / "0.npz"
    with zipfile.ZipFile(path) as archive:
        raw = archive.read("data.npy")
    for names in (("data.npy", "data.npy"), ("data.npy", "data"), ("data.npy", "other.npy")):
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
            warnings.simplefilter("ignore")  # zipfile warns of a name that is there already
            for name in names:
                archive.writestr(name, raw)
        data_error("0.npz has '(data|x)' twice", "npz", tmp_path)


def test_damaged_npz_is_data_or_one_message(tmp_path: Path) -> None:
    """For any bytes of a pickle the result is data or one message."""
    path = write_npz_clients(tmp_path, "train", {0: client_arrays(6)}) / "train" / "0.npz"
    with zipfile.ZipFile(path) as archive:
        raw = archive.read("data.npy")
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        broken = bytearray(raw)
        for place in generator.integers(0, len(raw), 3):
            broken[place] = generator.integers(256)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data.npy", bytes(broken[: generator.integers(len(raw) // 2, len(raw) + 1)]))
        try:
            open_data("npz", tmp_path)
            outcomes.add("read")
        except DataError:
            outcomes.add("refused")
    assert "refused" in outcomes
    path.write_bytes(path.read_bytes()[:100])
    data_error("cannot be read as npz", "npz", tmp_path)
