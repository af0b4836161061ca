"""MedMNIST's npz files: grey and coloured images, parts, labels of any integers, and refused ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.data_files import IMAGENET, all_rows, data_error, open_data, random_images
from support.launcher import run_program

COUNTS = {"train": 24, "val": 6, "test": 9}


def arrays(*shape: int) -> dict[str, np.ndarray]:
    """Return the arrays that the class of a MedMNIST data set reads."""
    made = {}
    for seed, (part, count) in enumerate(COUNTS.items()):
        made[f"{part}_images"] = random_images(count, *shape, seed=seed)
        made[f"{part}_labels"] = (np.arange(count) % 3).astype(np.uint8)[:, None]
    return made


def write(path: Path, tables: dict[str, Any]) -> Path:
    np.savez_compressed(path, **{name: table for name, table in tables.items() if table is not None})
    return path


@pytest.mark.parametrize(("shape", "channels"), [((28, 28), 1), ((28, 28, 3), 3), ((64, 64), 1)])
def test_training_and_official_test_part(tmp_path: Path, shape: tuple[int, ...], channels: int) -> None:
    made = arrays(*shape)
    data = open_data("npz", write(tmp_path / "pathmnist.npz", made))
    assert data.shape == (channels, *shape[:2]) and data.name == "pathmnist"
    x = np.concatenate([made["train_images"], made["test_images"]])
    assert np.array_equal(all_rows(data), x.transpose(0, 3, 1, 2) if channels == 3 else x[:, None])
    assert data.official_test is not None and data.official_test.tolist() == [False] * 24 + [True] * 9
    assert data.labels.tolist() == [*range(3)] * 11 and data.class_names == ("0", "1", "2")
    assert (data.mean, data.std) == (IMAGENET if channels == 3 else ((0.5,), (0.5,)))
    assert data.summary[-1] == (
        "data: left out: 6 validation samples: validation rows come from training rows (partition.validation)"
    )


def test_blood_cells_train_in_one_command(tmp_path: Path) -> None:
    path = write(tmp_path / "bloodmnist.npz", arrays(28, 28, 3))
    flags = ("--data.source", "npz", "--data.path", str(path), "--clients", "2", "--rounds", "1")
    flags += ("--model.dim", "16", "--partition.pool", "official", "--train.device", "cpu")
    assert run_program(0, *flags, cwd=tmp_path).code == 0


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"train_labels": np.zeros((24, 14), np.uint8)}, "up to 14 classes(.|\n)*labels\\[:, :1\\]"),
        ({"train_images": np.zeros((24, 28, 28, 28), np.uint8)}, "are volumes"),
        ({"train_images": None}, "has no array train_images(.|\n)*folder of train/0.npz"),
        ({"train_labels": None}, "train_images, and no train_labels"),
        ({"train_images": np.zeros((24, 28, 28), np.float32)}, "float32 .* not images"),
        ({"test_labels": np.zeros((8, 1), np.uint8)}, "has 9 test_images, but labels of uint8"),
        ({"test_labels": np.full((9, 1), np.nan)}, "labels of float64"),
        ({"test_images": np.zeros((9, 32, 32), np.uint8)}, "images of shapes"),
        ({"train_images": np.zeros((0, 28, 28), np.uint8)}, "not images"),
    ],
)
def test_bad_file_is_refused(tmp_path: Path, change: dict[str, Any], pattern: str) -> None:
    data_error(pattern, "npz", write(tmp_path / "a.npz", arrays(28, 28) | change))


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", arrays(28, 28))
    path.write_bytes(path.read_bytes()[:-400])
    data_error("cannot be read as npz", "npz", path)
