"""HDF5 files of users: what is read from them, and the messages about unusable ones."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import h5py
import numpy as np
import pytest

from pfedmoe_mpi.checkpoint import weights
from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.sources.hdf5 import write_hdf5
from pfedmoe_mpi.data.sources.open import open_dataset
from pfedmoe_mpi.errors import ConfigError, DataError
from support.data_files import (
    GOOD_X,
    GOOD_Y,
    NAN,
    all_rows,
    data_error,
    file_names,
    open_data,
    random_images,
    write_damaged_h5,
    write_h5,
)
from support.launcher import run_to_end


@pytest.mark.parametrize(
    "layout", [{}, {"chunks": (7, 2, 5, 5)}, {"chunks": (1, 2, 5, 5), "compression": "gzip"}]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_hdf5_rows_come_in_the_requested_order(tmp_path: Path, layout: dict[str, Any], dtype: type) -> None:
    x: np.ndarray = random_images(500, 2, 5, 5).astype(dtype)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=x, **layout)
        file["y"] = np.arange(500) % 3
    with open_data("hdf5", tmp_path / "a.h5") as data:
        assert (data.shape, data.classes, data.distributed) == ((2, 5, 5), 3, True)
        assert data.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
        generator = np.random.default_rng(1)
        picks = [
            [],
            [499],
            [3, 3, 0, 3],
            np.arange(500),
            generator.permutation(500),
            generator.integers(0, 500, 40),
        ]
        for pick in picks:
            rows = data.rows(np.array(pick, np.int64))
            assert rows.flags.c_contiguous and rows.dtype == data.dtype
            assert np.array_equal(rows, x[np.array(pick, np.int64)])


def test_hdf5_reads_only_the_requested_rows(tmp_path: Path) -> None:
    """Rows before and after a damaged chunk are read, because it is skipped; rows in it raise."""
    x = random_images(4000, 3, 16, 16)
    with open_data("hdf5", write_damaged_h5(tmp_path / "a.h5", x, 10, 2005)) as data:
        asked = np.array([1999, 3999, 5, 2010])
        assert np.array_equal(data.rows(asked), x[asked])
        with pytest.raises(DataError, match="rows 2000 to 2010 cannot be read"):
            data.rows(np.array([2003]))


def test_refused_hdf5_file_is_closed(tmp_path: Path) -> None:
    for labels in (GOOD_Y * 0, GOOD_Y[:2]):
        path = write_h5(tmp_path / "a.h5", x=GOOD_X, y=labels)
        with pytest.raises(DataError) as caught:
            open_data("hdf5", path)
        with h5py.File(path, "r+"):
            assert caught.value


def test_hdf5_file_of_a_writer_names_the_remedy(tmp_path: Path) -> None:
    """A file that is open elsewhere, as in a notebook, and one whose writer ended without closing it."""
    path, left = write_h5(tmp_path / "a.h5", x=GOOD_X, y=GOOD_Y), tmp_path / "left.h5"
    code = "import h5py, sys; file = h5py.File(sys.argv[1], 'r+'); print(flush=True); input()"
    with Popen([sys.executable, "-c", code, str(path)], stdin=PIPE, stdout=PIPE) as writer:
        assert writer.stdout
        writer.stdout.readline()
        message = data_error("cannot be opened as HDF5", "hdf5", path)
        with pytest.raises(
            ConfigError, match=r"cannot be opened as HDF5(.|\n)*remedy: close it in the program"
        ):
            weights.read(path, ["model"])
        writer.communicate(b"\n")
    assert "remedy: close it in the program that writes it" in message
    with h5py.File(tmp_path / "new.h5", "w", libver="latest") as file:
        file["x"], file["y"] = GOOD_X, GOOD_Y
        file.flush()
        left.write_bytes((tmp_path / "new.h5").read_bytes())
    assert f"h5clear -s {left}" in data_error("cannot be opened as HDF5", "hdf5", left)


def test_hdf5_shapes_are_accepted(tmp_path: Path) -> None:
    y = np.arange(6) % 2
    assert open_data("hdf5", write_h5(tmp_path / "a.h5", x=random_images(6, 8, 9), y=y)).shape == (1, 8, 9)
    data = open_data("hdf5", write_h5(tmp_path / "b.h5", x=np.ones((6, 13), np.float32), y=y))
    assert data.shape == (13,) and data.mean == () and data.name == "b"


def test_hdf5_optional_parts_are_read(tmp_path: Path) -> None:
    y, client, test = np.arange(6) % 2, np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 1, 0, 1])
    path = write_h5(tmp_path / "a.h5", x=random_images(6, 1, 4, 4), y=y, client=client, official_test=test)
    data = open_data("hdf5", path)
    assert data.client is not None and data.official_test is not None
    assert np.array_equal(data.client, client) and np.array_equal(data.official_test, test.astype(bool))


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ([10, 9, 100], ("9", "10", "100")),
        ([-5, 3, 4], ("-5", "3", "4")),
        (["b", "a", "ç"], ("a", "b", "ç")),
        (["10", "9", "x"], ("10", "9", "x")),
        (np.array([b"b", b"a", b"c"]), ("a", "b", "c")),
        (np.array([2, 1, 0], np.uint64), ("0", "1", "2")),
    ],
)
def test_labels_and_clients_are_any_integers_or_texts(tmp_path: Path, given: Any, names: Any) -> None:
    """They are numbered in sorted order, remember what they were, and are prepared again as they are."""
    values = [given[k] for k in GOOD_Y]
    path = write_h5(tmp_path / "a.h5", x=GOOD_X, y=values, client=values[::-1])
    prepared = tmp_path / "b.h5"
    with open_data("hdf5", path) as data:
        write_hdf5(prepared, data)
    for each in (path, prepared):
        with open_data("hdf5", each) as data:
            plain = [value.decode() if isinstance(value, bytes) else str(value) for value in values]
            assert data.class_names == names and [data.class_names[y] for y in data.labels] == plain
            shown = data.client_names or ("0", "1", "2")
            assert shown == names and [shown[k] for k in data.client] == plain[::-1]


def test_a_label_that_often_stands_for_a_missing_one_is_announced(tmp_path: Path) -> None:
    with open_data("hdf5", write_h5(tmp_path / "a.h5", x=GOOD_X, y=GOOD_Y - 1)) as data:
        assert any("'-1' is a class; remove its rows if" in warning for warning in data.warnings)
    with open_data("hdf5", write_h5(tmp_path / "b.h5", x=GOOD_X, y=GOOD_Y % 2 * 2 - 1)) as data:
        assert not data.warnings and data.class_names == ("-1", "1")


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int32, np.int64, np.uint64])
def test_integers_are_tokens(tmp_path: Path, kind: type) -> None:
    x = np.random.default_rng(0).integers(0, 90, (40, 5)).astype(kind)
    x[7, 2] = 101
    with open_data("hdf5", write_h5(tmp_path / "a.h5", x=x, y=np.arange(40) % 2)) as data:
        assert data.tokens and data.vocabulary == 102 and data.shape == (5,)
        assert all_rows(data).dtype == np.int32 and np.array_equal(all_rows(data), x)
    with_mean = {"mean": (0.5,) * 5, "std": (1.0,) * 5}
    data_error("do not apply to tokens", "hdf5", tmp_path / "a.h5", **with_mean)


def test_tokens_train_on_two_ranks(tmp_path: Path) -> None:
    """The second rank reads its own rows, and learns from the first how many tokens there are."""
    x = np.random.default_rng(0).integers(0, 90, (80, 5))
    path = write_h5(tmp_path / "a.h5", x=x, y=x[:, 0] % 3, client=np.arange(80) // 20 + 7)
    flags = ("--data.source", "hdf5", "--data.path", str(path), "--rounds", "1", "--model.dim", "16")
    run_to_end(2, *flags, cwd=tmp_path)


@pytest.mark.parametrize(
    ("tables", "pattern"),
    [
        ({"x": GOOD_X}, "no dataset 'y'; it has x"),
        ({"y": GOOD_Y}, "no dataset 'x'"),
        ({"x": GOOD_X, "y": GOOD_Y[:5]}, r"6 rows, but y has shape \(5,\)"),
        ({"x": GOOD_X, "y": GOOD_Y[:, None]}, r"y has shape \(6, 1\)"),
        ({"x": GOOD_X, "y": GOOD_Y + 0.5}, "y of .* is float64"),
        ({"x": GOOD_X, "y": ["a", "", "b"] * 2}, "y of .* is empty in row 1"),
        ({"x": GOOD_X, "y": ["a", "b"] * 3, "class_names": ["a", "b"]}, "holds texts, and class_names"),
        ({"x": GOOD_X, "y": GOOD_Y - 1, "class_names": ["a", "b", "c"]}, "row 0 has -1"),
        ({"x": GOOD_X, "y": GOOD_Y + 1, "class_names": ["a", "b", "c"]}, "run from 1 to 3, but class 0"),
        ({"x": GOOD_X, "y": GOOD_Y * 2, "class_names": ["a", "b", "c"]}, "class 1 has no row"),
        ({"x": GOOD_X, "y": GOOD_Y * 0}, "one class only"),
        ({"x": GOOD_X.astype(np.int64), "y": GOOD_Y}, "x of .* is int64"),
        ({"x": GOOD_X[..., None], "y": GOOD_Y}, "has shape"),
        ({"x": np.arange(6.0), "y": GOOD_Y}, "has shape"),
        ({"x": random_images(6, 8, 8, 3), "y": GOOD_Y}, "channels as the last dimension"),
        ({"x": GOOD_X[:0], "y": GOOD_Y[:0]}, "is empty"),
        ({"x": NAN, "y": GOOD_Y}, "row 4 holds a NaN"),
        ({"x": GOOD_X * 1e300, "y": GOOD_Y}, "NaN or an infinity"),
        ({"x": GOOD_X, "y": GOOD_Y, "client": GOOD_Y + 1, "client_names": ["a"] * 3}, "client 0 has no row"),
        ({"x": np.full((6, 3), -2), "y": GOOD_Y}, "row 0 holds a token that is negative"),
        ({"x": np.full((6, 3), 1 << 40), "y": GOOD_Y}, "or above 999,999"),
        ({"x": GOOD_X, "y": GOOD_Y, "client": GOOD_Y[:2]}, r"6 rows, but client has shape \(2,\)"),
        (
            {"x": GOOD_X, "y": GOOD_Y, "official_test": GOOD_Y},
            "official_test of .* other than true and false",
        ),
        ({"x": GOOD_X, "y": GOOD_Y, "class_names": ["a", "b"]}, "has 2 class names but rows of 3"),
        ({"x": GOOD_X, "y": GOOD_Y, "class_names": [1, 2, 3]}, "cannot be read"),
    ],
)
def test_unusable_hdf5_is_refused(tmp_path: Path, tables: dict[str, Any], pattern: str) -> None:
    data_error(pattern, "hdf5", write_h5(tmp_path / "a.h5", **tables))
    assert file_names(tmp_path) == ["a.h5"]


def test_gaps_between_rows_are_skipped_in_a_file_without_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = random_images(200_000, 16)
    with open_data("hdf5", write_h5(tmp_path / "a.h5", x=x, y=np.arange(len(x)) % 2)) as data:
        lengths, read = [], type(data.store)._read_span

        def counted(store: Any, first: int, last: int) -> np.ndarray:
            lengths.append(last - first)
            return read(store, first, last)

        monkeypatch.setattr(type(data.store), "_read_span", counted)
        assert np.array_equal(data.rows(np.array([150_000, 1])), x[[150_000, 1]])
    assert 16 * sum(lengths) <= 2 * 65536


def test_nan_is_reported_by_the_rank_that_reads_it(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "a.h5", x=NAN, y=GOOD_Y)
    data = open_dataset(Data(source="hdf5", path=str(path)), 0, clients=2, check=False)
    assert data.rows(np.array([0, 5])).all()
    with pytest.raises(DataError, match="row 4"):
        data.rows(np.array([0, 4]))


def test_truncated_or_other_file_is_not_read_as_hdf5(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("hello")
    data_error("cannot be opened as HDF5", "hdf5", tmp_path / "text.h5")
    path = write_h5(tmp_path / "a.h5", x=random_images(100, 3, 32, 32), y=np.arange(100) % 2)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data_error("cannot be opened as HDF5", "hdf5", path)


@pytest.mark.parametrize("source", ["hdf5", "folder", "npz"])
def test_missing_path_is_refused(tmp_path: Path, source: str) -> None:
    data_error("No such file", source, tmp_path / "nothing")
    assert not file_names(tmp_path)
