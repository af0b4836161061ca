"""The built-in data, torchvision's files and image folders."""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfedmoe_mpi.data.resize import resize
from support.data_files import (
    IMAGENET,
    all_rows,
    data_error,
    file_names,
    open_data,
    random_images,
    shared_data,
    write_h5,
    write_image_folder,
)

# digits and synthetic


def test_digits_equal_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    real = datasets.load_digits()
    data = open_data("digits")
    assert (data.shape, data.classes, data.dtype, len(data)) == ((1, 32, 32), 10, np.uint8, 1797)
    assert np.array_equal(data.labels, real.target)
    x = all_rows(data)[:, 0]
    assert x.max() == 255 and x.min() == 0
    assert np.array_equal(np.rint(x[:, ::4, ::4] / 255 * 16), real.images)
    for row in range(4):
        for column in range(4):
            assert np.array_equal(x[:, row::4, column::4], x[:, ::4, ::4])
    assert not data.distributed and data.client is None and data.official_test is None


def test_digits_are_resized() -> None:
    assert open_data("digits", size=8).shape == (1, 8, 8)
    assert open_data("digits", size=28).shape == (1, 28, 28)


def test_synthetic_repeats_by_seed_and_is_separable() -> None:
    data = open_data("synthetic", samples=600, classes=5, size=16)
    assert (data.shape, data.classes, data.dtype, len(data)) == ((3, 16, 16), 5, np.uint8, 600)
    assert np.array_equal(all_rows(data), all_rows(open_data("synthetic", samples=600, classes=5, size=16)))
    other = open_data("synthetic", samples=600, classes=5, size=16, seed=1)
    assert not np.array_equal(all_rows(data), all_rows(other))
    x = all_rows(data).reshape(600, -1).astype(np.float64)
    means = np.stack([x[:300][data.labels[:300] == label].mean(axis=0) for label in range(5)])
    nearest = ((x[300:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == data.labels[300:]).mean() > 0.95
    assert data.client is not None and np.unique(data.client).tolist() == [0, 1, 2, 3]


def test_synthetic_with_too_few_samples_is_refused() -> None:
    data_error("below the number of classes", "synthetic", samples=10, classes=11)
    data_error("below the number of clients", "synthetic", samples=10, classes=2, clients=11)


# normalisation and size


def test_normalisation_setting_wins_and_must_fit() -> None:
    assert (open_data("digits").mean, open_data("digits").std) == ((0.5,), (0.5,))
    data = open_data("digits", mean=(0.1,), std=(0.3,))
    assert (data.mean, data.std) == ((0.1,), (0.3,))
    data_error("3 numbers, but a sample has 1 channels", "digits", mean=(0.1, 0.2, 0.3), std=(1, 1, 1))


def test_resize_agrees_with_pillow() -> None:
    x = random_images(3, 1, 20, 28)
    for size in (7, 16, 20, 50):
        ours = resize(x, size)[:, 0].astype(int)
        theirs = [Image.fromarray(image[0]).resize((size, size), Image.Resampling.BILINEAR) for image in x]
        assert np.abs(ours - np.stack([np.asarray(image) for image in theirs])).max() <= 1
    assert np.array_equal(resize(x, 16)[1:2], resize(x[1:2], 16))


def test_size_resizes_rows_of_a_file(tmp_path: Path) -> None:
    x = random_images(6, 3, 10, 12)
    path = write_h5(tmp_path / "a.h5", x=x, y=np.arange(6) % 2)
    data = open_data("hdf5", path, size=8)
    assert data.shape == (3, 8, 8) and data.distributed
    assert np.array_equal(data.rows(np.array([4, 1])), resize(x[[4, 1]], 8))
    flat = write_h5(tmp_path / "b.h5", x=x.reshape(6, -1), y=np.arange(6) % 2)
    data_error("data.size = 8 needs images", "hdf5", flat, size=8)


# image folders


def test_folder_reads_pixels_in_sorted_order(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path, {"zebra": 3, "ant": 2})
    (root / "ant" / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    data = open_data("folder", root)
    assert (data.shape, data.class_names, data.labels.tolist()) == (
        (3, 8, 10),
        ("ant", "zebra"),
        [0, 0, 1, 1, 1],
    )
    assert (data.mean, data.std) == IMAGENET and data.official_test is None and not data.distributed
    pixels = np.concatenate([random_images(2, 8, 10, 3, seed=1), random_images(3, 8, 10, 3, seed=0)])
    assert np.array_equal(all_rows(data), pixels.transpose(0, 3, 1, 2))


def test_folder_may_hold_train_and_test(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "train", {"a": 3, "b": 2})
    write_image_folder(tmp_path / "test", {"a": 1, "b": 2})
    data = open_data("folder", tmp_path)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 0, 1, 1]
    assert data.official_test is not None and data.official_test.tolist() == [False] * 5 + [True] * 3
    write_image_folder(tmp_path / "test" / "c", {"deeper": 1})
    data_error("differ in class c", "folder", tmp_path)


def test_folder_stays_grey_unless_an_image_has_colours(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path, {"a": 2, "b": 300}, shape=(8, 10))
    grey = open_data("folder", root)
    assert (grey.shape, grey.mean) == ((1, 8, 10), (0.5,))
    Image.fromarray(random_images(1, 8, 10, 3)[0]).save(root / "b" / "z.png")
    both = open_data("folder", root)
    assert both.shape == (3, 8, 10)
    assert np.array_equal(both.rows(np.arange(302)), all_rows(grey).repeat(3, axis=1))


def test_folder_of_mixed_sizes_needs_a_size(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path, {"a": 2, "b": 2})
    Image.fromarray(random_images(1, 5, 5, 3)[0]).save(root / "b" / "z.png")
    assert "--data.size" in data_error(r"z.png has 5 × 5 pixels, .*0.png 8 × 10", "folder", root)
    assert open_data("folder", root, size=6).shape == (3, 6, 6)


def test_unusable_image_folder_is_refused(tmp_path: Path) -> None:
    data_error("no class folders", "folder", tmp_path)
    root = write_image_folder(tmp_path, {"a": 2, "b": 0})
    data_error("b holds no image(.|\n)*or remove .*b", "folder", root)
    (root / "b" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    data_error("bad.png cannot be read as an image", "folder", root)
    Image.fromarray(random_images(1, 8, 10)[0].astype(np.uint16)).save(root / "b" / "bad.png")
    data_error("more than 8 bits", "folder", root)
    data_error("cannot be listed", "folder", root / "a" / "0.png")


def test_cifar10_images_are_read(tmp_path: Path) -> None:
    with tarfile.open(shared_data("cifar10-images.tar")) as tar:
        members = [member for member in tar if re.search(r"/\d\d[05]0\.jpg$", member.name)]
        tar.extractall(tmp_path, members, filter="data")
    data = open_data("folder", tmp_path)
    assert (data.shape, data.classes, data.dtype) == ((3, 32, 32), 10, np.uint8)
    assert data.class_names[:2] == ("airplane", "automobile") and (data.mean, data.std) == IMAGENET
    assert data.official_test is not None
    assert np.bincount(data.labels[~data.official_test]).tolist() == [100] * 10
    assert np.bincount(data.labels[data.official_test]).tolist() == [20] * 10
    ships = all_rows(data)[data.labels == 8].mean(axis=(0, 2, 3))
    frogs = all_rows(data)[data.labels == 6].mean(axis=(0, 2, 3))
    assert ships[2] > ships[0] and frogs[2] < frogs[0], "sea and sky are blue, ponds are not: R, G, B order"


# torchvision


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write the format of MNIST's files: a magic number, the shape as big-endian integers, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.mark.parametrize(
    ("name", "prefixes", "classes"),
    [("MNIST", ("train", "t10k"), 10), ("EMNIST", ("emnist-balanced-train", "emnist-balanced-test"), 47)],
)
def test_torchvision_reads_a_local_root(
    tmp_path: Path, name: str, prefixes: tuple[str, str], classes: int
) -> None:
    parts = [
        (random_images(2 * classes, 28, 28), np.arange(2 * classes) % classes),
        (random_images(5, 28, 28), np.arange(5)),
    ]
    for prefix, (x, y) in zip(prefixes, parts, strict=True):
        write_idx(tmp_path / name / "raw" / f"{prefix}-images-idx3-ubyte", x)
        write_idx(tmp_path / name / "raw" / f"{prefix}-labels-idx1-ubyte", y)
    before = file_names(tmp_path)
    data = open_data("torchvision", tmp_path, name=name.lower())
    assert (data.name, data.shape, data.classes, data.dtype) == (name, (1, 28, 28), classes, np.uint8)
    assert data.official_test is not None and np.flatnonzero(data.official_test).tolist() == [
        *range(2 * classes, 2 * classes + 5)
    ]
    stored = np.concatenate([x for x, _ in parts])
    upright = stored.transpose(0, 2, 1) if name == "EMNIST" else stored
    assert np.array_equal(all_rows(data)[:, 0], upright)
    assert np.array_equal(data.labels, np.concatenate([y for _, y in parts]))
    assert file_names(tmp_path) == before


def test_torchvision_reads_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR's format is pickled rows of red, green and blue planes, in files whose MD5 torchvision checks."""
    from torchvision.datasets import CIFAR10

    x, folder = random_images(25, 3, 32, 32), tmp_path / CIFAR10.base_folder
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
    data = open_data("torchvision", tmp_path, name="CIFAR10")
    assert (data.shape, data.class_names[3], (data.mean, data.std)) == ((3, 32, 32), "class 3", IMAGENET)
    assert np.array_equal(all_rows(data), x) and data.labels.tolist() == [*range(10), *range(10), *range(5)]


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "EMNIST", "SVHN", "CIFAR10", "CIFAR100"])
def test_torchvision_downloads_only_on_request(tmp_path: Path, name: str) -> None:
    message = data_error(f"{name} is not downloaded", "torchvision", tmp_path / "root", name=name)
    assert "data prepare" in message and not file_names(tmp_path)


def test_unknown_torchvision_name_is_refused(tmp_path: Path) -> None:
    data_error(
        "data.name = 'CIFAR1O' is unknown; did you mean 'CIFAR10'", "torchvision", tmp_path, name="CIFAR1O"
    )
