"""Sources of data: what comes out of real files, and what a user hears about unusable ones."""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from pfedmoe_mpi.config import Config, Data, build
from pfedmoe_mpi.data import Dataset, make_partition, open_dataset
from pfedmoe_mpi.data.pickles import read_arrays
from pfedmoe_mpi.data.prepare import heat_map, prepare, write_partition
from pfedmoe_mpi.data.resize import resize
from pfedmoe_mpi.errors import DataError, PartitionError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def shared(name: str) -> Path:
    path = Path(__file__).parents[2] / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"{name} is not beside the repository")
    return path


def opened(
    source: str, path: Path | str = "", *, seed: int = 0, clients: int = 4, **settings: Any
) -> Dataset:
    return open_dataset(Data(source=source, path=str(path), **settings), seed, clients=clients)


def everything(data: Dataset) -> np.ndarray:
    return data.rows(np.arange(len(data)))


def refused(pattern: str, source: str, path: Path | str = "", **settings: Any) -> str:
    """The message about these data; it matches `pattern` and holds a remedy."""
    with pytest.raises(DataError, match=pattern) as caught:
        opened(source, path, **settings)
    assert "remedy: " in str(caught.value)
    return str(caught.value)


def write_h5(path: Path, **tables: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, table in tables.items():
            file[name] = table
    return path


def images(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def snapshot(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# digits and synthetic


def test_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    real = datasets.load_digits()
    data = opened("digits")
    assert (data.shape, data.classes, data.dtype, len(data)) == ((1, 32, 32), 10, np.uint8, 1797)
    assert np.array_equal(data.labels, real.target)
    x = everything(data)[:, 0]
    assert x.max() == 255 and x.min() == 0
    assert np.array_equal(np.rint(x[:, ::4, ::4] / 255 * 16), real.images)
    for row in range(4):
        for column in range(4):
            assert np.array_equal(x[:, row::4, column::4], x[:, ::4, ::4])
    assert not data.distributed and data.client is None and data.official_test is None


def test_digits_at_another_size() -> None:
    assert opened("digits", size=8).shape == (1, 8, 8)
    assert opened("digits", size=28).shape == (1, 28, 28)


def test_synthetic_repeats_by_seed_and_can_be_told_apart() -> None:
    data = opened("synthetic", samples=600, classes=5, size=16)
    assert (data.shape, data.classes, data.dtype, len(data)) == ((3, 16, 16), 5, np.uint8, 600)
    assert np.array_equal(everything(data), everything(opened("synthetic", samples=600, classes=5, size=16)))
    other = opened("synthetic", samples=600, classes=5, size=16, seed=1)
    assert not np.array_equal(everything(data), everything(other))
    x = everything(data).reshape(600, -1).astype(np.float64)
    means = np.stack([x[:300][data.labels[:300] == label].mean(axis=0) for label in range(5)])
    nearest = ((x[300:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == data.labels[300:]).mean() > 0.95
    assert data.client is not None and np.unique(data.client).tolist() == [0, 1, 2, 3]


def test_synthetic_with_too_few_samples() -> None:
    refused("below the number of classes", "synthetic", samples=10, classes=11)
    refused("below the number of clients", "synthetic", samples=10, classes=2, clients=11)


# normalisation and size


def test_normalisation_of_settings_wins_and_must_fit() -> None:
    assert (opened("digits").mean, opened("digits").std) == ((0.5,), (0.5,))
    data = opened("digits", mean=(0.1,), std=(0.3,))
    assert (data.mean, data.std) == ((0.1,), (0.3,))
    refused("3 numbers, a sample has 1 channels", "digits", mean=(0.1, 0.2, 0.3), std=(1, 1, 1))


def test_resize_agrees_with_pillow() -> None:
    x = images(3, 1, 20, 28)
    for size in (7, 16, 20, 50):
        ours = resize(x, size)[:, 0].astype(int)
        theirs = [Image.fromarray(image[0]).resize((size, size), Image.Resampling.BILINEAR) for image in x]
        assert np.abs(ours - np.stack([np.asarray(image) for image in theirs])).max() <= 1
    assert np.array_equal(resize(x, 16)[1:2], resize(x[1:2], 16))


def test_size_resizes_rows_of_a_file(tmp_path: Path) -> None:
    x = images(6, 3, 10, 12)
    path = write_h5(tmp_path / "a.h5", x=x, y=np.arange(6) % 2)
    data = opened("hdf5", path, size=8)
    assert data.shape == (3, 8, 8) and data.distributed
    assert np.array_equal(data.rows(np.array([4, 1])), resize(x[[4, 1]], 8))
    flat = write_h5(tmp_path / "b.h5", x=x.reshape(6, -1), y=np.arange(6) % 2)
    refused("data.size 8 is for images", "hdf5", flat, size=8)


# HDF5


@pytest.mark.parametrize(
    "layout", [{}, {"chunks": (7, 2, 5, 5)}, {"chunks": (1, 2, 5, 5), "compression": "gzip"}]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_hdf5_rows_come_in_the_order_asked(tmp_path: Path, layout: dict[str, Any], dtype: type) -> None:
    x: np.ndarray = images(500, 2, 5, 5).astype(dtype)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=x, **layout)
        file["y"] = np.arange(500) % 3
    with opened("hdf5", tmp_path / "a.h5") as data:
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


def damaged_h5(path: Path, x: np.ndarray, block: int, damaged: int) -> Path:
    """`x` in chunks of `block` rows under checksums, the chunk of row `damaged` spoilt."""
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=x, chunks=(block, *x.shape[1:]), fletcher32=True)
        file["y"] = np.arange(len(x)) % 2
        place = file["x"].id.get_chunk_info_by_coord((damaged // block * block, 0, 0, 0)).byte_offset
    with path.open("r+b") as raw:
        raw.seek(place)
        raw.write(bytes(64))
    return path


def test_hdf5_reads_a_few_rows_without_the_rest(tmp_path: Path) -> None:
    """Rows around a damaged place are read, as nothing between them is; rows in it are an error."""
    x = images(4000, 3, 16, 16)
    with opened("hdf5", damaged_h5(tmp_path / "a.h5", x, 10, 2005)) as data:
        asked = np.array([1999, 3999, 5, 2010])
        assert np.array_equal(data.rows(asked), x[asked])
        with pytest.raises(DataError, match="rows 2000 to 2010 cannot be read"):
            data.rows(np.array([2003]))


def test_a_refused_file_is_closed(tmp_path: Path) -> None:
    for labels in (GOOD_Y + 1, GOOD_Y[:2]):
        path = write_h5(tmp_path / "a.h5", x=GOOD_X, y=labels)
        with pytest.raises(DataError) as caught:
            opened("hdf5", path)
        with h5py.File(path, "r+"):
            assert caught.value


def test_hdf5_shapes(tmp_path: Path) -> None:
    y = np.arange(6) % 2
    assert opened("hdf5", write_h5(tmp_path / "a.h5", x=images(6, 8, 9), y=y)).shape == (1, 8, 9)
    data = opened("hdf5", write_h5(tmp_path / "b.h5", x=np.ones((6, 13), np.float32), y=y))
    assert data.shape == (13,) and data.mean == () and data.name == "b"


def test_hdf5_optional_parts(tmp_path: Path) -> None:
    y, client, test = np.arange(6) % 2, np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 1, 0, 1])
    path = write_h5(tmp_path / "a.h5", x=images(6, 1, 4, 4), y=y, client=client, official_test=test)
    data = opened("hdf5", path)
    assert data.client is not None and data.official_test is not None
    assert np.array_equal(data.client, client) and np.array_equal(data.official_test, test.astype(bool))


GOOD_X = images(6, 1, 4, 4)
GOOD_Y = np.array([0, 1, 2, 0, 1, 2])
NAN = np.where(np.arange(6 * 16).reshape(6, 1, 4, 4) == 70, np.nan, 1.0)


@pytest.mark.parametrize(
    ("tables", "pattern"),
    [
        ({"x": GOOD_X}, "no dataset 'y'; it has x"),
        ({"y": GOOD_Y}, "no dataset 'x'"),
        ({"x": GOOD_X, "y": GOOD_Y[:5]}, r"6 rows, y has shape \(5,\)"),
        ({"x": GOOD_X, "y": GOOD_Y[:, None]}, r"y has shape \(6, 1\)"),
        ({"x": GOOD_X, "y": GOOD_Y + 0.5}, "labels of .* are float64"),
        ({"x": GOOD_X, "y": GOOD_Y - 1}, "row 0 has -1"),
        ({"x": GOOD_X, "y": GOOD_Y + 1}, "run from 1 to 3, but class 0(.|\n)*subtract 1 from each"),
        ({"x": GOOD_X, "y": GOOD_Y * 2}, "class 1 has no row"),
        ({"x": GOOD_X, "y": GOOD_Y * 0}, "one class only"),
        ({"x": GOOD_X.astype(np.int64), "y": GOOD_Y}, "x of .* is int64"),
        ({"x": GOOD_X[..., None], "y": GOOD_Y}, "has shape"),
        ({"x": np.arange(6.0), "y": GOOD_Y}, "has shape"),
        ({"x": images(6, 8, 8, 3), "y": GOOD_Y}, "channels in the last place"),
        ({"x": GOOD_X[:0], "y": GOOD_Y[:0]}, "is empty"),
        ({"x": NAN, "y": GOOD_Y}, "row 4 holds a NaN"),
        ({"x": GOOD_X * 1e300, "y": GOOD_Y}, "NaN or an infinity"),
        ({"x": GOOD_X, "y": GOOD_Y, "client": GOOD_Y + 1}, "client 0 has no row"),
        ({"x": GOOD_X, "y": GOOD_Y, "client": GOOD_Y[:2]}, r"6 rows, client has shape \(2,\)"),
        ({"x": GOOD_X, "y": GOOD_Y, "official_test": GOOD_Y}, "official_test of .* more than true and false"),
        ({"x": GOOD_X, "y": GOOD_Y, "class_names": ["a", "b"]}, "names 2 classes and has rows of 3"),
        ({"x": GOOD_X, "y": GOOD_Y, "class_names": [1, 2, 3]}, "cannot be read"),
    ],
)
def test_hdf5_refused(tmp_path: Path, tables: dict[str, Any], pattern: str) -> None:
    refused(pattern, "hdf5", write_h5(tmp_path / "a.h5", **tables))
    assert snapshot(tmp_path) == ["a.h5"]


def test_nan_is_found_by_the_rank_that_reads_it(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "a.h5", x=NAN, y=GOOD_Y)
    data = open_dataset(Data(source="hdf5", path=str(path)), 0, clients=2, check=False)
    assert data.rows(np.array([0, 5])).all()
    with pytest.raises(DataError, match="row 4"):
        data.rows(np.array([0, 4]))


def test_a_file_that_is_not_hdf5_or_cut_short(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("hello")
    refused("cannot be opened as HDF5", "hdf5", tmp_path / "text.h5")
    path = write_h5(tmp_path / "a.h5", x=images(100, 3, 32, 32), y=np.arange(100) % 2)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused("cannot be opened as HDF5", "hdf5", path)


@pytest.mark.parametrize("source", ["hdf5", "folder", "npz"])
def test_missing_path(tmp_path: Path, source: str) -> None:
    refused("No such file", source, tmp_path / "nothing")
    assert not snapshot(tmp_path)


# image folders


def image_folder(root: Path, counts: dict[str, int], shape: tuple[int, ...] = (8, 10, 3)) -> Path:
    for seed, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number, pixels in enumerate(images(count, *shape, seed=seed)):
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_folder_reads_pixels_in_sorted_order(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"zebra": 3, "ant": 2})
    (root / "ant" / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    data = opened("folder", root)
    assert (data.shape, data.class_names, data.labels.tolist()) == (
        (3, 8, 10),
        ("ant", "zebra"),
        [0, 0, 1, 1, 1],
    )
    assert (data.mean, data.std) == IMAGENET and data.official_test is None and not data.distributed
    pixels = np.concatenate([images(2, 8, 10, 3, seed=1), images(3, 8, 10, 3, seed=0)])
    assert np.array_equal(everything(data), pixels.transpose(0, 3, 1, 2))


def test_folder_with_train_and_test(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", {"a": 3, "b": 2})
    image_folder(tmp_path / "test", {"a": 1, "b": 2})
    data = opened("folder", tmp_path)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 0, 1, 1]
    assert data.official_test is not None and data.official_test.tolist() == [False] * 5 + [True] * 3
    image_folder(tmp_path / "test" / "c", {"deeper": 1})
    refused("differ in class c", "folder", tmp_path)


def test_folder_keeps_grey_unless_one_image_has_colours(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"a": 2, "b": 300}, shape=(8, 10))
    grey = opened("folder", root)
    assert (grey.shape, grey.mean) == ((1, 8, 10), (0.5,))
    Image.fromarray(images(1, 8, 10, 3)[0]).save(root / "b" / "z.png")
    both = opened("folder", root)
    assert both.shape == (3, 8, 10)
    assert np.array_equal(both.rows(np.arange(302)), everything(grey).repeat(3, axis=1))


def test_folder_of_mixed_sizes_needs_a_size(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"a": 2, "b": 2})
    Image.fromarray(images(1, 5, 5, 3)[0]).save(root / "b" / "z.png")
    assert "--data.size" in refused(r"z.png has 5 × 5 pixels, .*0.png 8 × 10", "folder", root)
    assert opened("folder", root, size=6).shape == (3, 6, 6)


def test_folder_refused(tmp_path: Path) -> None:
    refused("no class folders", "folder", tmp_path)
    root = image_folder(tmp_path, {"a": 2, "b": 0})
    refused("b holds no image", "folder", root)
    (root / "b" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    refused("bad.png cannot be read as an image", "folder", root)
    Image.fromarray(images(1, 8, 10)[0].astype(np.uint16)).save(root / "b" / "bad.png")
    refused("more than 8 bits", "folder", root)
    refused("cannot be listed", "folder", root / "a" / "0.png")


def test_cifar10_images(tmp_path: Path) -> None:
    with tarfile.open(shared("cifar10-images.tar")) as tar:
        members = [member for member in tar if re.search(r"/\d\d[05]0\.jpg$", member.name)]
        tar.extractall(tmp_path, members, filter="data")
    data = opened("folder", tmp_path)
    assert (data.shape, data.classes, data.dtype) == ((3, 32, 32), 10, np.uint8)
    assert data.class_names[:2] == ("airplane", "automobile") and (data.mean, data.std) == IMAGENET
    assert data.official_test is not None
    assert np.bincount(data.labels[~data.official_test]).tolist() == [100] * 10
    assert np.bincount(data.labels[data.official_test]).tolist() == [20] * 10
    ships = everything(data)[data.labels == 8].mean(axis=(0, 2, 3))
    frogs = everything(data)[data.labels == 6].mean(axis=(0, 2, 3))
    assert ships[2] > ships[0] and frogs[2] < frogs[0], "sea and sky are blue, ponds are not: R, G, B order"


# npz


def write_clients(root: Path, part: str, clients: dict[Any, Any]) -> Path:
    (root / part).mkdir(parents=True, exist_ok=True)
    for client, content in clients.items():
        np.savez_compressed(root / part / f"{client}.npz", data=content)
    return root


def client_data(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).standard_normal((n, 1, 4, 4)).astype(np.float32)
    return {"x": x, "y": np.arange(n) % 3}


def test_npz_clients_of_mnist() -> None:
    path = shared("mnist-20clients")
    data = opened("npz", path)
    assert (data.shape, data.classes, data.dtype, len(data)) == ((1, 28, 28), 10, np.float32, 70_000)
    assert data.mean == () and data.client is not None and data.official_test is not None
    with np.load(path / "test" / "7.npz", allow_pickle=True) as archive:
        real = archive["data"].tolist()
    mine = np.flatnonzero((data.client == 7) & data.official_test)
    assert np.array_equal(data.rows(mine), real["x"]) and np.array_equal(data.labels[mine], real["y"])


def test_npz_train_and_test_of_each_client(tmp_path: Path) -> None:
    parts = [client_data(n, seed=n) for n in (6, 3, 5, 4)]
    write_clients(tmp_path, "train", {0: parts[0], 1: parts[2]})
    write_clients(tmp_path, "test", {0: parts[1], 1: parts[3]})
    data = opened("npz", tmp_path)
    assert data.client is not None and data.official_test is not None
    assert data.client.tolist() == [0] * 9 + [1] * 9
    assert np.flatnonzero(data.official_test).tolist() == [6, 7, 8, 14, 15, 16, 17]
    assert np.array_equal(everything(data), np.concatenate([part["x"] for part in parts]))
    assert np.array_equal(data.labels, np.concatenate([part["y"] for part in parts]))


def test_npz_labels_of_unlike_integers(tmp_path: Path) -> None:
    for client, dtype in enumerate((np.uint64, np.int64)):
        content = {"x": GOOD_X, "y": GOOD_Y.astype(dtype)}
        write_clients(tmp_path, "train", {client: content})
    assert opened("npz", tmp_path).labels.tolist() == [*GOOD_Y, *GOOD_Y]


def test_npz_of_plain_arrays_and_without_test(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    np.savez(tmp_path / "train" / "0.npz", x=images(6, 5, 5), y=GOOD_Y.astype(np.uint64))
    data = opened("npz", tmp_path)
    assert (data.shape, data.dtype, data.official_test) == ((1, 5, 5), np.uint8, None)
    assert np.array_equal(everything(data)[:, 0], images(6, 5, 5))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickled_arrays_of_every_kind(protocol: int) -> None:
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
        content = {**client_data(6), "z": Evil(function, argument)}
        refused(f"holds a pickled .*({named})", "npz", write_clients(tmp_path / "d", "train", {0: content}))
    assert not mark.exists()


def test_npz_pickle_with_numpy_functions_is_refused(tmp_path: Path) -> None:
    for evil in (Evil(np.fromfile, "/dev/null"), Evil(np.memmap, "x"), np.ma.masked_array([1]), np.polyval):
        content = {**client_data(6), "z": evil}
        refused("holds a pickled numpy", "npz", write_clients(tmp_path, "train", {0: content}))


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ({"x": GOOD_X}, "no arrays x and y; it has x"),
        ({"x": GOOD_X, "y": [0, 1, 2, 0, 1, 2]}, "no arrays x and y"),
        ({1, 2}, "not one dict"),
        ({"x": GOOD_X, "y": GOOD_Y[:3]}, "6 samples and labels"),
        ({"x": GOOD_X, "y": GOOD_Y / 2}, "6 samples and labels of float64"),
        ({"x": NAN, "y": GOOD_Y}, "0.npz: row 4 holds a NaN"),
        ({"x": GOOD_X.astype(np.int32), "y": GOOD_Y}, "is int32"),
        ({"x": GOOD_X, "y": GOOD_Y + 1}, "subtract 1"),
        ({"x": np.array(["a"] * 6), "y": GOOD_Y}, "an array of dtype"),
        ({"x": np.array([[{}]] * 6), "y": GOOD_Y}, "no arrays x and y; it has y"),
    ],
)
def test_npz_refused(tmp_path: Path, content: Any, pattern: str) -> None:
    refused(pattern, "npz", write_clients(tmp_path, "train", {0: content}))


def test_npz_layout_refused(tmp_path: Path) -> None:
    refused("has no train/0.npz", "npz", tmp_path)
    write_clients(tmp_path, "train", {0: client_data(6), 2: client_data(6)})
    refused("has no train/1.npz", "npz", tmp_path)
    write_clients(tmp_path, "train", {1: {"x": images(6, 1, 5, 5), "y": GOOD_Y}})
    refused(r"x of client 1 is uint8 \(1, 5, 5\), of client 0 float32 \(1, 4, 4\)", "npz", tmp_path)
    write_clients(tmp_path, "train", {1: client_data(6)})
    write_clients(tmp_path, "test", {5: client_data(6)})
    refused("test/5.npz without a train part", "npz", tmp_path)


def test_npz_damaged(tmp_path: Path) -> None:
    """Whatever bytes a pickle is made of, the answer is data or one message."""
    path = write_clients(tmp_path, "train", {0: client_data(6)}) / "train" / "0.npz"
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
            opened("npz", tmp_path)
            outcomes.add("read")
        except DataError:
            outcomes.add("refused")
    assert "refused" in outcomes
    path.write_bytes(path.read_bytes()[:100])
    refused("cannot be read as npz", "npz", tmp_path)


# torchvision


def write_idx(path: Path, array: np.ndarray) -> None:
    """The format of MNIST's files: a magic number, the shape as big-endian integers, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.mark.parametrize(
    ("name", "prefixes", "classes"),
    [("MNIST", ("train", "t10k"), 10), ("EMNIST", ("emnist-balanced-train", "emnist-balanced-test"), 47)],
)
def test_torchvision_from_a_local_root(
    tmp_path: Path, name: str, prefixes: tuple[str, str], classes: int
) -> None:
    parts = [
        (images(2 * classes, 28, 28), np.arange(2 * classes) % classes),
        (images(5, 28, 28), np.arange(5)),
    ]
    for prefix, (x, y) in zip(prefixes, parts, strict=True):
        write_idx(tmp_path / name / "raw" / f"{prefix}-images-idx3-ubyte", x)
        write_idx(tmp_path / name / "raw" / f"{prefix}-labels-idx1-ubyte", y)
    before = snapshot(tmp_path)
    data = opened("torchvision", tmp_path, name=name.lower())
    assert (data.name, data.shape, data.classes, data.dtype) == (name, (1, 28, 28), classes, np.uint8)
    assert data.official_test is not None and np.flatnonzero(data.official_test).tolist() == [
        *range(2 * classes, 2 * classes + 5)
    ]
    stored = np.concatenate([x for x, _ in parts])
    upright = stored.transpose(0, 2, 1) if name == "EMNIST" else stored
    assert np.array_equal(everything(data)[:, 0], upright)
    assert np.array_equal(data.labels, np.concatenate([y for _, y in parts]))
    assert snapshot(tmp_path) == before


def test_torchvision_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR's format: pickled rows of a red, green and blue plane, in files whose MD5 torchvision knows."""
    from torchvision.datasets import CIFAR10

    x, folder = images(25, 3, 32, 32), tmp_path / CIFAR10.base_folder
    folder.mkdir()
    listed = {}
    for name, rows in (("data_batch_1", slice(0, 20)), ("test_batch", slice(20, 25))):
        batch = {"data": x[rows].reshape(-1, 3072), "labels": (np.arange(25)[rows] % 10).tolist()}
        listed[name] = pickle.dumps(batch)
    listed["batches.meta"] = pickle.dumps({"label_names": [f"class {label}" for label in range(10)]})
    for name, raw in listed.items():
        (folder / name).write_bytes(raw)
    sums = {name: hashlib.md5(raw).hexdigest() for name, raw in listed.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        CIFAR10, "meta", {**CIFAR10.meta, "filename": "batches.meta", "md5": sums["batches.meta"]}
    )
    data = opened("torchvision", tmp_path, name="CIFAR10")
    assert (data.shape, data.class_names[3], (data.mean, data.std)) == ((3, 32, 32), "class 3", IMAGENET)
    assert np.array_equal(everything(data), x) and data.labels.tolist() == [*range(10), *range(10), *range(5)]


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "EMNIST", "SVHN", "CIFAR10", "CIFAR100"])
def test_torchvision_never_downloads_unasked(tmp_path: Path, name: str) -> None:
    message = refused(f"{name} is not downloaded", "torchvision", tmp_path / "root", name=name)
    assert "data prepare" in message and not snapshot(tmp_path)


def test_torchvision_unknown_name(tmp_path: Path) -> None:
    refused("no data.name 'CIFAR1O'; did you mean 'CIFAR10'", "torchvision", tmp_path, name="CIFAR1O")


# prepare and write_partition


def configured(**settings: Any) -> Config:
    names = {"seed", "clients", "rounds"}
    return build(
        {name if name in names else name.replace("__", "."): value for name, value in settings.items()}
    )


def same(one: Dataset, other: Dataset) -> None:
    for name in ("name", "shape", "classes", "class_names", "mean", "std", "dtype"):
        assert getattr(one, name) == getattr(other, name), name
    for name in ("labels", "client", "official_test"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert (ours is None and theirs is None) or (
            np.array_equal(ours, theirs) and ours.dtype == theirs.dtype
        )
    assert np.array_equal(everything(one), everything(other))


def test_prepared_data_are_the_same_data(tmp_path: Path) -> None:
    image_folder(tmp_path / "f" / "train", {"ä": 3, "b": 2})
    image_folder(tmp_path / "f" / "test", {"ä": 1, "b": 2})
    write_clients(tmp_path / "n", "train", {0: client_data(6), 1: client_data(7)})
    flat = write_h5(tmp_path / "flat.h5", x=np.arange(60.0).reshape(6, 10), y=GOOD_Y)
    for number, data in enumerate(
        (
            {"data__source": "digits"},
            {"data__source": "folder", "data__path": str(tmp_path / "f")},
            {"data__source": "npz", "data__path": str(tmp_path / "n")},
            {"data__source": "hdf5", "data__path": str(flat)},
            {"data__source": "synthetic", "data__mean": "0.1,0.2,0.3", "data__std": "1,2,3"},
        )
    ):
        config = configured(clients=2, **data)
        out = tmp_path / f"{number}.h5"
        summary = prepare(config, out)
        assert "\n" not in summary and str(out) in summary
        with open_dataset(config.data, 0, clients=2) as before, opened("hdf5", out) as after:
            same(before, after)
            assert after.distributed
    with h5py.File(tmp_path / "0.h5") as file:
        assert file["x"].chunks[1:] == (1, 32, 32) and 1 < file["x"].chunks[0] < 100


def test_prepare_overwrites_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    out.write_text("mine")
    for write in (prepare, write_partition):
        with pytest.raises(DataError, match="exists and is not overwritten"):
            write(configured(), out)
        with pytest.raises(DataError, match="no folder"):
            write(configured(), tmp_path / "sub" / "out.h5")
    assert out.read_text() == "mine"
    bad = write_h5(tmp_path / "bad.h5", x=GOOD_X, y=GOOD_Y + 1)
    with pytest.raises(DataError, match="subtract 1"):
        prepare(configured(data__source="hdf5", data__path=str(bad)), tmp_path / "new.h5")
    with pytest.raises(PartitionError):
        write_partition(configured(partition__kind="natural"), tmp_path / "new.h5")
    assert snapshot(tmp_path) == ["bad.h5", "out.h5"]


def test_prepare_that_fails_half_way(tmp_path: Path) -> None:
    """A file damaged behind its header fails while rows are copied: no output, no temporary file."""
    path = damaged_h5(tmp_path / "a.h5", images(5000, 1, 8, 8), 100, 3000)
    with pytest.raises(DataError, match="cannot be read"):
        prepare(configured(data__source="hdf5", data__path=str(path)), tmp_path / "b.h5")
    assert snapshot(tmp_path) == ["a.h5"]


def test_partition_is_written_with_its_row_numbers(tmp_path: Path) -> None:
    config = configured(clients=7, partition__validation=0.2)
    text = write_partition(config, tmp_path / "p.h5")
    data = opened("digits")
    partition = make_partition(config.partition, data.labels, data.classes, 7, 0)
    with h5py.File(tmp_path / "p.h5") as file:
        assert file.attrs["digest"] == partition.digest()
        for name in ("train", "validation", "test"):
            rows, offsets = file[name]["rows"][()], file[name]["offsets"][()]
            for client, part in enumerate(getattr(partition, name)):
                assert np.array_equal(rows[offsets[client] : offsets[client + 1]], part)
    assert text == heat_map(partition, data)


def test_heat_map_shows_who_has_what_and_stops_at_forty() -> None:
    data = opened("digits")
    settings = configured(partition__kind="pathological").partition
    few = heat_map(make_partition(settings, data.labels, 10, 5, 0), data).splitlines()
    assert len(few) == 6
    for line in few[1:]:
        cells = line.split("|")[1]
        assert len(cells) == 20 and len(cells.replace(" ", "")) == 4, "two classes, two characters each"
    many = heat_map(make_partition(settings, data.labels, 10, 50, 0), data).splitlines()
    assert len(many) == 42 and many[-1] == "and 10 more clients"


def test_heat_map_as_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_partition(configured(), tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        assert image.format == "PNG" and min(image.size) > 300
    assert snapshot(tmp_path) == ["p.png"]


def test_a_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DataError, match=re.escape("pfedmoe_mpi[report]")):
        write_partition(configured(), tmp_path / "p.png")
    assert not snapshot(tmp_path)
