"""Warnings on rows that are equal, unusual values, and copies of test rows: for every kind of source."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.data_files import open_data, random_images, write_h5

Y = np.arange(40) % 2
TEST = np.arange(40) % 4 == 3
FLOATS = np.random.default_rng(0).random((40, 1, 4, 4), np.float32)


@pytest.mark.parametrize(
    ("x", "pattern"),
    [
        (np.full((40, 1, 4, 4), 7, np.uint8), "all 40 rows that were compared are equal"),
        (np.ones((40, 6), np.float32), "all 40 rows that were compared are equal"),
        (random_images(40, 1, 4, 4) // 128, "bytes are only 0 and 1, which are divided by 255"),
        (FLOATS * 255, "images are floats up to 25[0-9.]+, which are not divided by 255"),
    ],
)
def test_unusual_values_are_announced(tmp_path: Path, x: np.ndarray, pattern: str) -> None:
    path = write_h5(tmp_path / "a.h5", x=x, y=Y)
    warnings = open_data("hdf5", path).warnings
    assert any(re.search(pattern, text) for text in warnings), warnings


@pytest.mark.parametrize(
    ("x", "settings"),
    [
        (random_images(40, 1, 4, 4), {}),
        (FLOATS, {}),
        (FLOATS * 255, {"mean": (128.0,), "std": (64.0,)}),
        (FLOATS * 255 - 128, {}),
        (FLOATS.reshape(40, 16) * 255, {}),
    ],
)
def test_usual_values_are_not(tmp_path: Path, x: np.ndarray, settings: dict[str, Any]) -> None:
    path = write_h5(tmp_path / "a.h5", x=x, y=Y, official_test=TEST)
    assert open_data("hdf5", path, **settings).warnings == ()


def test_copies_between_training_and_test_rows_are_counted(tmp_path: Path) -> None:
    x = random_images(40, 1, 4, 4)
    x[3], x[7], x[8] = x[0], x[1], x[2]  # 3 and 7 are test rows; 8 is of the class of 2
    path = write_h5(tmp_path / "a.h5", x=x, y=Y, official_test=TEST)
    (warning,) = open_data("hdf5", path).warnings
    assert warning == (
        "images with the pixels of an earlier one: 3 of 40, 2 across training and test part, "
        "1 across classes; for example row 0 and row 3; remove copies"
    )
    path = write_h5(tmp_path / "b.h5", x=x.reshape(40, 16), y=Y, official_test=TEST)
    (warning,) = open_data("hdf5", path).warnings
    assert warning.startswith(
        "rows with the values of an earlier one: 2 of 40, 2 across training and test part"
    )
    path = write_h5(tmp_path / "c.h5", x=x.reshape(40, 16), y=Y)
    assert open_data("hdf5", path).warnings == (), "features may be equal by chance"


def test_a_test_row_that_comes_first_counts_as_well(tmp_path: Path) -> None:
    lines = ["x,y,part", "1.5,a,test", "1.5,a,train", "2.5,b,train", "3.5,a,train", "2.5,b,test"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    (warning,) = open_data("table", tmp_path / "t.csv", label="y", split="part").warnings
    assert ": 2 of 5, 2 across training and test part; for example row 0 and row 1" in warning


def test_windows_of_a_text_are_not_searched(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a b c " * 30)
    assert open_data("words", tmp_path, length=3).warnings == ()
