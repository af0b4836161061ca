"""`data prepare` and `data partition`: the same data in one file, and the partition in a file."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from pfedmoe_mpi.commands.data import heat_map, prepare, write_partition
from pfedmoe_mpi.config import Config, build
from pfedmoe_mpi.data import Dataset, make_partition
from pfedmoe_mpi.data.sources.open import open_dataset
from pfedmoe_mpi.errors import DataError, PartitionError
from support.data_files import (
    GOOD_X,
    GOOD_Y,
    all_rows,
    client_arrays,
    file_names,
    open_data,
    random_images,
    write_damaged_h5,
    write_h5,
    write_image_folder,
    write_npz_clients,
)
from support.text_files import write_stories


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
    assert np.array_equal(all_rows(one), all_rows(other))


def test_prepared_file_holds_the_same_data(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "f" / "train", {"ä": 3, "b": 2})
    write_image_folder(tmp_path / "f" / "test", {"ä": 1, "b": 2})
    write_npz_clients(tmp_path / "n", "train", {0: client_arrays(6), 1: client_arrays(7)})
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
        with open_dataset(config.data, 0, clients=2) as before, open_data("hdf5", out) as after:
            same(before, after)
            assert after.distributed
    with h5py.File(tmp_path / "0.h5") as file:
        assert file["x"].chunks[1:] == (1, 32, 32) and 1 < file["x"].chunks[0] < 100


def test_prepare_keeps_existing_files_and_leaves_none_on_error(tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    out.write_text("mine")
    for write in (prepare, write_partition):
        with pytest.raises(DataError, match="exists and is not overwritten"):
            write(configured(), out)
        with pytest.raises(DataError, match="no folder"):
            write(configured(), tmp_path / "sub" / "out.h5")
    assert out.read_text() == "mine"
    bad = write_h5(tmp_path / "bad.h5", x=GOOD_X, y=GOOD_Y[:-1])
    with pytest.raises(DataError, match="one value per sample"):
        prepare(configured(data__source="hdf5", data__path=str(bad)), tmp_path / "new.h5")
    with pytest.raises(PartitionError):
        write_partition(configured(partition__kind="natural"), tmp_path / "new.h5")
    assert file_names(tmp_path) == ["bad.h5", "out.h5"]


def test_prepare_that_fails_while_copying_leaves_no_file(tmp_path: Path) -> None:
    """A file damaged behind its header fails while rows are copied: no output, no temporary file."""
    path = write_damaged_h5(tmp_path / "a.h5", random_images(5000, 1, 8, 8), 100, 3000)
    with pytest.raises(DataError, match="cannot be read"):
        prepare(configured(data__source="hdf5", data__path=str(path)), tmp_path / "b.h5")
    assert file_names(tmp_path) == ["a.h5"]


def test_partition_file_lists_row_numbers(tmp_path: Path) -> None:
    config = configured(clients=7, partition__validation=0.2)
    text = write_partition(config, tmp_path / "p.h5")
    data = open_data("digits")
    partition = make_partition(config.partition, data.labels, data.classes, 7, 0)
    with h5py.File(tmp_path / "p.h5") as file:
        assert file.attrs["digest"] == partition.digest()
        for name in ("train", "validation", "test"):
            rows, offsets = file[name]["rows"][()], file[name]["offsets"][()]
            for client, part in enumerate(getattr(partition, name)):
                assert np.array_equal(rows[offsets[client] : offsets[client + 1]], part)
    assert text == heat_map(partition, data)


def test_next_word_classes_are_those_of_a_run(tmp_path: Path) -> None:
    stories = str(write_stories(tmp_path / "stories"))
    words = {"data__source": "words", "data__path": stories, "data__length": 4, "data__vocabulary": 5}
    assert "classes 0 to 5 " in write_partition(configured(**words), tmp_path / "p.h5")


def test_heat_map_shows_counts_of_at_most_forty_clients() -> None:
    data = open_data("digits")
    settings = configured(partition__kind="pathological").partition
    few = heat_map(make_partition(settings, data.labels, 10, 5, 0), data).splitlines()
    assert len(few) == 6
    for line in few[1:]:
        cells = line.split("|")[1]
        assert len(cells) == 20 and len(cells.replace(" ", "")) == 4, "two classes, two characters each"
    many = heat_map(make_partition(settings, data.labels, 10, 50, 0), data).splitlines()
    assert len(many) == 42 and many[-1] == "and 10 more clients"


def test_heat_map_is_written_as_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_partition(configured(), tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        assert image.format == "PNG" and min(image.size) > 300
    assert file_names(tmp_path) == ["p.png"]


def test_picture_names_classes_between_dollars(tmp_path: Path) -> None:
    """matplotlib takes `$…$` for a formula, and ends at one that is none."""
    pytest.importorskip("matplotlib")
    write_image_folder(tmp_path / "images", {"$5_$": 30, "$0-$50k": 30})
    folder = {"data__source": "folder", "data__path": str(tmp_path / "images"), "clients": 2}
    write_partition(configured(**folder), tmp_path / "p.png")
    assert (tmp_path / "p.png").exists()


def test_picture_without_matplotlib_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DataError, match=re.escape("pfedmoe_mpi[report]")):
        write_partition(configured(), tmp_path / "p.png")
    assert not file_names(tmp_path)
