"""Data sets that Hugging Face's `datasets` wrote: saved folders and Parquet shards, and damaged ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pfedmoe_mpi.errors import DataError
from support.data_files import all_rows, data_error, open_data, random_images
from support.launcher import Result

try:
    import datasets
except ModuleNotFoundError:
    if os.environ.get("CI"):
        raise
    pytest.skip("the package `datasets` is not installed", allow_module_level=True)

NAMES = ["cat", "dog", "eel"]
COUNTS = {"train": 30, "test": 12, "validation": 6}
PIXELS = {part: random_images(count, 8, 8, 3, seed=count) for part, count in COUNTS.items()}


def split(part: str) -> Any:
    count = COUNTS[part]
    columns = {
        "image": [Image.fromarray(pixels) for pixels in PIXELS[part]],
        "fine": [k % 3 for k in range(count)],
        "writer": [f"w{k % 2}" for k in range(count)],
        "boxes": [[1.0, 2.0]] * count,
    }
    features = {
        "image": datasets.Image(),
        "fine": datasets.ClassLabel(names=NAMES),
        "writer": datasets.Value("string"),
        "boxes": datasets.Sequence(datasets.Value("float32")),
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of `save_to_disk`, with the training part in two files."""
    root = tmp_path_factory.mktemp("hf") / "animals"
    parts = datasets.DatasetDict({part: split(part) for part in COUNTS})
    parts.save_to_disk(str(root), num_shards={"train": 2, "test": 1, "validation": 1})
    return root


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of Parquet shards as the Hub lays them out."""
    root = tmp_path_factory.mktemp("hub")
    (root / "data").mkdir()
    (root / "README.md").write_text("card", encoding="utf-8")
    for part in COUNTS:
        whole = split(part)
        for k in range(2):
            whole.shard(2, k).to_parquet(str(root / "data" / f"{part}-{k:05}-of-00002.parquet"))
    return root


@pytest.mark.parametrize("kind", ["saved", "hub"])
def test_declared_columns_are_image_and_label(kind: str, request: pytest.FixtureRequest) -> None:
    data = open_data("hf", request.getfixturevalue(kind), client="writer")
    assert data.class_names == tuple(NAMES) and data.client_names == ("w0", "w1")
    assert data.official_test is not None and data.official_test.tolist() == [False] * 30 + [True] * 12
    pixels = np.concatenate([PIXELS["train"], PIXELS["test"]])
    assert np.array_equal(all_rows(data), pixels.transpose(0, 3, 1, 2))
    assert data.labels.tolist() == [k % 3 for part in ("train", "test") for k in range(COUNTS[part])]
    assert data.client is not None and data.client.tolist() == [k % 2 for k in range(30)] + [0, 1] * 6
    assert data.left_out == (
        "column 'boxes': not read beside data.image",
        "part 'validation': validation rows come from training rows (partition.validation)",
    )
    assert data.proposals == {"partition.kind": "natural"}


def test_writers_train_in_one_command(run_command: Callable[..., Result], saved: Path) -> None:
    flags = ("--data.source", "hf", "--data.path", str(saved), "--data.client", "writer", "--rounds", "1")
    out = run_command(*flags, "--model.dim", "16", "--train.device", "cpu").out
    assert "0 w0, 1 w1" in out and "data: 3 classes (samples): cat (14), dog (14), eel (14)" in out


def test_images_by_path_lie_below_the_folder(tmp_path: Path) -> None:
    """The library stores a path in place of bytes where it does not embed files."""
    import pyarrow as arrow
    from pyarrow import parquet

    (tmp_path / "i").mkdir()
    for k in range(4):
        Image.fromarray(PIXELS["test"][k]).save(tmp_path / "i" / f"{k}.png")
    features = datasets.Features({"image": datasets.Image(), "y": datasets.Value("string")})
    rows = {"image": [{"bytes": None, "path": f"i/{k}.png"} for k in range(4)], "y": ["a", "b"] * 2}
    parquet.write_table(arrow.table(rows, schema=features.arrow_schema), tmp_path / "t.parquet")
    data = open_data("hf", tmp_path / "t.parquet", label="y")
    assert np.array_equal(all_rows(data), PIXELS["test"][:4].transpose(0, 3, 1, 2))
    rows["image"][2] = {"bytes": None, "path": "/home/else/2.png"}
    parquet.write_table(arrow.table(rows, schema=features.arrow_schema), tmp_path / "t.parquet")
    data_error("row 3: the image '/home/else/2.png' lies outside", "hf", tmp_path / "t.parquet", label="y")
    rows["image"][2] = None
    parquet.write_table(arrow.table(rows, schema=features.arrow_schema), tmp_path / "t.parquet")
    data_error("column 'image' has no image in row 3", "hf", tmp_path / "t.parquet", label="y")


def test_declared_classes_without_rows_are_left_out(tmp_path: Path) -> None:
    split("train").filter(lambda row: row["fine"] != 1).save_to_disk(str(tmp_path / "f"))
    data = open_data("hf", tmp_path / "f")
    assert data.class_names == ("cat", "eel")
    assert data.left_out[-1] == "1 declared classes without a row, such as dog"


def test_selected_rows_texts_and_features(tmp_path: Path) -> None:
    rows = {"text": ["a b", "c d e", "a"], "stars": [1, 5, 1], "x": [0.5, 1.5, 2.5]}
    datasets.Dataset.from_dict(rows).select([2, 0, 1]).save_to_disk(str(tmp_path / "s"))
    data = open_data("hf", tmp_path / "s", label="stars", text="text", length=3)
    assert all_rows(data).tolist() == [[1, 0, 0], [1, 2, 0], [3, 4, 5]] and data.class_names == ("1", "5")
    assert data.labels.tolist() == [0, 0, 1] and data.official_test is None
    features = open_data("hf", tmp_path / "s", label="stars", ignore="text")
    assert all_rows(features)[:, 0].tolist() == [2.5, 0.5, 1.5]


# Bad folders


def test_bad_folders_are_refused(saved: Path, hub: Path, tmp_path: Path) -> None:
    data_error("library saved(.|\n)*--data.source hf", "table", saved, label="fine")
    data_error("column 'boxes' is list.*, and columns are numbers", "hf", saved, label="fine", text="boxes")
    data_error("images are bytes, or names of files", "hf", saved, image="boxes")
    data_error("data.label = coarse, but .* has the columns image, fine", "hf", saved, label="coarse")
    data_error("has no file .*parquet", "hf", tmp_path)
    (tmp_path / "t.csv").write_text("x,y\n1,a\n")
    data_error("t.csv is not a file of Hugging Face(.|\n)*--data.source table", "hf", tmp_path / "t.csv")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "loop").symlink_to(tmp_path / "loop")
    data_error("loop has no file .*parquet", "hf", tmp_path / "loop")
    unlabelled = split("test").map(lambda row: {"fine": -1}, load_from_cache_file=False)
    unlabelled.save_to_disk(str(tmp_path / "u"))
    data_error("-1 stands for a missing label", "hf", tmp_path / "u")
    copy = tmp_path / "c"
    shutil.copytree(saved, copy)
    train = copy / "train" / "data-00000-of-00002.arrow"
    train.write_bytes(train.read_bytes()[:-3000])
    data_error("cannot be read as an Arrow stream", "hf", copy)
    train.unlink()
    data_error("data-00000-of-00002.arrow cannot be read", "hf", copy)
    state = copy / "train" / "state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": "../secret.arrow"}]}))
    data_error("'../secret.arrow', which is outside", "hf", copy)
    state.write_text(
        json.dumps({"_data_files": [{"filename": "a"}], "_indices_data_files": [{"filename": "i"}]})
    )
    data_error("a selection of rows(.|\n)*flatten_indices", "hf", copy)
    state.write_text("{")
    data_error("state.json is damaged", "hf", copy)
    state.write_text("{}")
    data_error("names no data files", "hf", copy)
    shutil.rmtree(copy / "train")
    data_error("state.json cannot be read: No such file", "hf", copy)


def test_damaged_and_compressed_streams_are_data_errors(tmp_path: Path) -> None:
    import pyarrow as arrow

    root = tmp_path / "d"
    datasets.Dataset.from_dict({"x": [1.0, 2.0] * 20, "y": ["a", "b"] * 20}).save_to_disk(str(root))
    path = next(root.glob("*.arrow"))
    raw, draw = path.read_bytes(), np.random.default_rng(0)
    for number in range(300):
        damaged = bytearray(raw)
        for place in draw.integers(0, len(raw), 3):
            damaged[place] = draw.integers(256)
        path.write_bytes(damaged if number > 20 else damaged[: draw.integers(len(raw))])
        with suppress(DataError):
            open_data("hf", root, label="y")
    with arrow.OSFile(str(path), "wb") as out:
        table = arrow.table({"x": np.zeros(100_000), "y": np.arange(100_000) % 2})
        options = arrow.ipc.IpcWriteOptions(compression="zstd")
        with arrow.ipc.new_stream(out, table.schema, options=options) as stream:
            stream.write_table(table)
    data_error("is compressed", "hf", root, label="y")
