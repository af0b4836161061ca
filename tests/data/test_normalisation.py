"""Mean and std of every origin are checked alike: flags, HDF5 attributes, prepared files, sources."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.dataset import MemoryRows, SourceData, build_dataset
from pfedmoe_mpi.errors import DataError
from support.data_files import GOOD_X, GOOD_Y, data_error, open_data, write_h5, write_image_folder

FEATURES = np.random.default_rng(0).normal(5, 2, (6, 3)).astype(np.float32)
# (message, attributes of images of one channel)
BAD = (
    (
        "the std of channel 0 is 0;(.|\n)*remedy: set the std of a channel that never varies to 1",
        ([0.5], [0.0]),
    ),
    ("the std of channel 0 is nan", ([0.5], [np.nan])),
    ("the std of channel 0 is inf", ([0.5], [np.inf])),
    ("the std of channel 0 is -1", ([0.5], [-1.0])),
    ("the std of channel 0 is 1e-45", ([0.0], [1e-45])),
    ("the mean of channel 0 is nan", ([np.nan], [1.0])),
    ("the mean of channel 0 is 1e\\+300", ([1e300], [1.0])),
    ("have 3 numbers, but a sample has 1 channels(.|\n)*give 1 numbers each", ([0.1, 0.2, 0.3], [1.0] * 3)),
    ("have 1 and 3 numbers, but a sample has 1 channels", ([0.5], [1.0] * 3)),
    ("have 1 and 0 numbers", ([0.5], None)),
    ("have 0 and 1 numbers", (None, [0.5])),
    ("the mean of channel 0 is 125.3, but uint8 samples(.|\n)*by 255", ([125.3], [63.0])),
)


def write_normalised(path: Path, x: np.ndarray, mean: Any, std: Any) -> Path:
    with h5py.File(write_h5(path, x=x, y=GOOD_Y), "r+") as file:
        file.attrs.update(
            {name: value for name, value in (("mean", mean), ("std", std)) if value is not None}
        )
    return path


@pytest.mark.parametrize(("pattern", "constants"), BAD)
def test_unusable_attributes_of_hdf5_are_refused(tmp_path: Path, pattern: str, constants: Any) -> None:
    path = write_normalised(tmp_path / "a.h5", GOOD_X, *constants)
    assert f"mean and std of {path}" in data_error(pattern, "hdf5", path)
    data = open_data("hdf5", path, mean=(0.25,), std=(2,))
    assert (data.mean, data.std) == ((0.25,), (2,)), "flags replace what the file says"


@pytest.mark.parametrize(("pattern", "constants"), BAD)
def test_unusable_flags_and_constants_of_sources_are_refused_alike(pattern: str, constants: Any) -> None:
    mean, std = (tuple(value or ()) for value in constants)
    if np.isfinite([*mean, *std]).all():
        data_error(f"data.mean and data.std(.|\n)*{pattern}", "digits", mean=mean, std=std)
    source = SourceData("own", "own source", MemoryRows(GOOD_X), GOOD_Y, mean=mean, std=std)
    with pytest.raises(DataError, match=f"mean and std of own source(.|\n)*{pattern}"):
        build_dataset(source, Data())


def test_constant_feature_is_refused_and_named(tmp_path: Path) -> None:
    """In floating point the std of a constant is not always 0."""
    x = FEATURES.copy()
    x[:, 1] = 7
    data_error("std of feature 1 is 0", "hdf5", write_normalised(tmp_path / "a.h5", x, x.mean(0), x.std(0)))
    tenths = np.full((6, 3), 0.1)
    assert 0 < tenths[:, 0].std() < 1e-16
    path = write_normalised(tmp_path / "b.h5", tenths, tenths.mean(0), tenths.std(0))
    data_error(
        "std of feature 0 is .*e-17(.|\n)*set the std of a feature that never varies to 1", "hdf5", path
    )
    with h5py.File(path, "r+") as file:
        file.attrs["std"] = np.ones(3)
    assert open_data("hdf5", path).std == (1, 1, 1)


def test_usable_constants_are_kept(tmp_path: Path) -> None:
    """Any shape with one number per channel; a mean of float32 samples may be anywhere."""
    x = np.repeat(GOOD_X, 3, axis=1)
    mean, std = np.array([0.0, 0.5, 1.0]).reshape(3, 1, 1), np.full((3, 1, 1), 1 / 255)
    data = open_data("hdf5", write_normalised(tmp_path / "a.h5", x, mean, std))
    assert data.mean == (0, 0.5, 1) and data.std == (1 / 255,) * 3
    mean, std = FEATURES.mean(0) * [1, -50, 1e6], FEATURES.std(0)
    data = open_data("hdf5", write_normalised(tmp_path / "b.h5", FEATURES, mean, std))
    assert data.mean == tuple(mean) and data.std == tuple(map(float, std))
    assert open_data("hdf5", write_normalised(tmp_path / "c.h5", FEATURES, None, None)).std == ()
    assert open_data("hdf5", write_normalised(tmp_path / "d.h5", GOOD_X, None, None)).std == (0.5,)


def test_unusable_attributes_end_every_command_with_one_message(
    assert_refused: Callable[..., str], tmp_path: Path
) -> None:
    path = write_normalised(tmp_path / "a.h5", GOOD_X, [0.5], [0.0])
    flags = ("--data.source", "hdf5", "--data.path", path, "--clients", "1")
    for command in ((), ("data", "prepare", tmp_path / "b.h5"), ("data", "partition", tmp_path / "p.h5")):
        assert_refused("std of channel 0 is 0", *command, *flags)


def test_prepared_file_keeps_the_constants(run_command: Callable[..., Any], tmp_path: Path) -> None:
    write_image_folder(tmp_path / "images", {"a": 4, "b": 4})
    flags = ("--data.source", "folder", "--data.path", "images", "--data.mean", "0.1,0.2,0.3")
    run_command("data", "prepare", "a.h5", *flags, "--data.std", "0.5,1,2")
    data = open_data("hdf5", tmp_path / "a.h5")
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (0.5, 1, 2))
