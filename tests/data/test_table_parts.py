"""Tables of several files, official test parts, images and texts in columns; and bad ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support.data_files import all_rows, data_error, file_names, open_data, random_images
from support.launcher import Result

PIXELS = random_images(12, 8, 8, 3)


def write_rows(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_images(root: Path, name: str = "t.csv") -> Path:
    """Write twelve images, and a table of their paths, with labels, writers and parts."""
    (root / "img").mkdir(parents=True)
    for k, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(root / "img" / f"{k}.png")
    part = ["train", "train", "test", "val"]
    lines = [f"img/{k}.png,{'cat' if k % 2 else 'dog'},w{k % 3},{part[k % 4]},{k}" for k in range(12)]
    return write_rows(root / name, ["file,label,writer,part,age", *lines])


def test_image_column_and_official_part_by_a_column(tmp_path: Path) -> None:
    path, columns = write_images(tmp_path), {"label": "label", "image": "file"}
    data = open_data("table", path, **columns, client="writer", split="part")
    kept = np.array([k for k in range(12) if k % 4 != 3])
    assert np.array_equal(all_rows(data), PIXELS[kept].transpose(0, 3, 1, 2))
    assert data.official_test is not None and np.array_equal(data.official_test, kept % 4 == 2)
    assert [data.class_names[y] for y in data.labels] == ["cat" if k % 2 else "dog" for k in kept]
    assert data.client is not None and data.client.tolist() == (kept % 3).tolist()
    assert data.left_out == (
        "column 'age': not read beside data.image",
        "3 validation rows: validation rows come from training rows (partition.validation)",
    )
    assert data.mean and open_data("table", path, **columns, size=4).shape == (3, 4, 4)


def test_images_of_a_column_are_read_as_those_of_a_folder(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = Image.fromarray(PIXELS[0][:4])
    upright.save(tmp_path / "a.png", exif=turned)
    Image.fromarray(random_images(1, 8, 4, 4)[0], mode="CMYK").save(tmp_path / "b.jpg")
    path = write_rows(tmp_path / "t.csv", ["x,y", "a.png,1", "b.jpg,0"])
    data = open_data("table", path, label="y", image="x")
    assert data.shape == (3, 8, 4) and len(data.warnings) == 2
    assert np.array_equal(all_rows(data)[0].transpose(1, 2, 0), np.rot90(PIXELS[0][:4], -1))


@pytest.mark.parametrize("names", [("train.csv", "test.csv"), ("train/a.csv", "test/b.csv")])
def test_official_part_by_a_file_or_folder_beside(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, first in zip(names, (0, 6), strict=True):
        rows = [f"{k * k},{'ab'[k % 2]},n{k % 3}" for k in range(first, first + 6)]
        write_rows(tmp_path / name, ["x,y,code", *rows])
    data = open_data("table", tmp_path, label="y")
    assert data.official_test is not None and data.official_test.tolist() == [False] * 6 + [True] * 6
    assert all_rows(data)[:, 0].tolist() == [k * k for k in range(12)] and data.shape == (4,)
    write_rows(tmp_path / names[0].replace("train", "val"), ["x,y,code", "1,a,n1"])
    assert "part 'val" in open_data("table", tmp_path, label="y").left_out[0]
    alone = open_data("table", tmp_path / names[0], label="y")
    if "/" not in names[0]:
        assert len(alone) == 6 and alone.left_out[0].startswith("test.csv, because data.path names one file")


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parts = ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")
    for part, first in zip(parts, (0, 6, 12), strict=True):
        rows = {"x": [float(k * k) for k in range(first, first + 6)], "y": ["a", "b"] * 3}
        (tmp_path / "data").mkdir(exist_ok=True)
        parquet.write_table(arrow.table(rows), tmp_path / "data" / f"{part}.parquet")
    for path in (tmp_path, tmp_path / "data"):
        data = open_data("table", path, label="y")
        assert all_rows(data)[:, 0].tolist() == [k * k for k in range(18)]
        assert np.array_equal(data.official_test, np.arange(18) >= 12)
    parquet.write_table(arrow.table({"x": [1.0], "z": ["a"]}), tmp_path / "data" / "train-00002.parquet")
    data_error("train-00002.parquet has no column 'y'", "table", tmp_path, label="y")


def test_texts_are_tokens(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.csv", ["head,y,body,id", "Ab c,0,d,1", ",1,Ab,2", "d,1,,3"])
    data = open_data("table", path, label="y", text=("head", "body"), length=3)
    assert all_rows(data).tolist() == [[1, 2, 3], [1, 0, 0], [3, 0, 0]]  # ab, c, d
    assert data.tokens and data.left_out == ("column 'id': not read beside data.text",)
    characters = open_data("table", path, label="y", text=("head", "body"), length=6, tokens="char")
    assert all_rows(characters).tolist()[0] == [2, 3, 1, 4, 1, 5], "space, A, b, c, d"


def test_clients_with_too_few_rows_are_left_out(tmp_path: Path) -> None:
    """Their rows may have been the only ones of a class; the proposed minimum of rows suits the others."""
    rows = [f"{k * k},{'ab'[k % 2]},big" for k in range(8)] + ["5,c,small", "6,a,small"]
    rows[3:3] = [f"{k},b,ten" for k in range(3)]
    path = write_rows(tmp_path / "t.csv", ["x,y,site", *rows])
    data = open_data("table", path, label="y", client="site")
    assert data.client_names == ("big", "ten") and data.class_names == ("a", "b") and len(data) == 11
    assert data.client is not None and data.client.tolist() == [0] * 3 + [1] * 3 + [0] * 5
    assert all_rows(data)[:, 0].tolist() == [0, 1, 4, 0, 1, 2, 9, 16, 25, 36, 49]
    assert data.left_out == ("1 clients with fewer than 3 rows, such as small",)
    assert data.proposals == {"partition.kind": "natural", "partition.min_samples": 3}


def test_clients_are_kept_whose_names_are_numbers_once_another_is_left_out(tmp_path: Path) -> None:
    """Beside the text `other` their names are texts, and alone they are numbers: 1.0 becomes 1."""
    rows = [f"{k * k},{'ab'[k % 2]},{('2.0', '1.0')[k % 2]}" for k in range(8)] + ["5,a,other"]
    data = open_data("table", write_rows(tmp_path / "t.csv", ["x,y,site", *rows]), label="y", client="site")
    assert data.client_names == ("1", "2") and len(data) == 8
    assert data.client is not None and data.client.tolist() == [1, 0] * 4
    assert data.left_out == ("1 clients with fewer than 3 rows, such as other",)


def test_table_of_images_trains(run_command: Callable[..., Result], tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    rows = ["file,label,writer"]
    for k, pixels in enumerate(random_images(60, 8, 8)):
        (root / "i").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "i" / f"{k}.png")
        rows.append(f"i/{k}.png,{k % 3},w{k % 2}")
    flags = ("--data.source", "table", "--data.path", str(write_rows(root / "t.csv", rows)))
    flags += ("--data.label", "label", "--data.image", "file", "--data.client", "writer", "--rounds", "1")
    assert "0 w0, 1 w1" in run_command(*flags, "--model.dim", "16", "--train.device", "cpu").out


# Bad tables


@pytest.mark.parametrize(
    ("lines", "given", "pattern"),
    [
        (["x,y", "no.png,1", "a.png,0"], {"image": "x"}, "no.png is not a file"),
        (["x,y", "a.png,1", ",0"], {"image": "x"}, "column 'x' has no image in line 3"),
        (["x,y", "../a.png,1"], {"image": "x"}, "line 2: the image '../a.png' lies outside"),
        (["x,y", "i/../../a.png,1"], {"image": "x"}, "lies outside of the table's folder"),
        (["x,y", "/etc/passwd,1"], {"image": "x"}, "the image '/etc/passwd' lies outside"),
        (["x,y", "t.csv,1", "a.png,0"], {"image": "x"}, "t.csv cannot be read as an image"),
        (["x,y", "a.png,1", "b.png,0"], {"image": "x"}, "b.png has 4 × 8 pixels(.|\n)*--data.size 32"),
        (["x,y,s", "a.png,1,tset"], {"image": "x", "split": "s"}, "data.split = s is 'tset' in line 2"),
        (["x,y,s", "1,1,test", "2,0,test"], {"split": "s"}, "no training row"),
        (["x,y,s", "1,1,val", "2,0,val"], {"split": "s"}, "no row below its header"),
        (["x,y", "a,1", "b,0"], {"image": "x", "text": "y"}, "exclude each other"),
        (["x,y", "a,1", "b,0"], {"text": "y"}, "data.label and data.text both name the column 'y'"),
        (["x,y", "a,1", "b,0"], {"split": "z"}, "data.split = z, but .* has the columns x, y"),
    ],
)
def test_bad_table_is_refused(tmp_path: Path, lines: list[str], given: dict[str, Any], pattern: str) -> None:
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    Image.fromarray(PIXELS[0][:4]).save(tmp_path / "b.png")
    data_error(pattern, "table", write_rows(tmp_path / "t.csv", lines), label="y", **given)


def test_bad_folder_is_refused(tmp_path: Path) -> None:
    data_error("has no file", "table", tmp_path, label="y")
    write_rows(tmp_path / "a" / "t.csv", ["x,y", "1,a"])
    write_rows(tmp_path / "b" / "t.csv", ["x,y", "1,a"])
    data_error("it has the folders a, b(.|\n)*--data.path .*/a", "table", tmp_path, label="y")
    write_rows(tmp_path / "train.csv", ["x,y", "1,a"])
    write_rows(tmp_path / "other.csv", ["x,y", "1,a"])
    write_rows(tmp_path / "test.csv", ["x,y", "1,a", "2,?"])
    (tmp_path / "other.csv").rename(tmp_path / "o")
    data_error("label is missing in line 3 of test.csv", "table", tmp_path, label="y")
    (tmp_path / "o").rename(tmp_path / "other.csv")
    (tmp_path / "test.csv").unlink()
    data_error("other.csv beside files whose names name a part", "table", tmp_path, label="y")
    (tmp_path / "other.csv").rename(tmp_path / "training.csv")
    data = open_data("table", write_images(tmp_path / "c").parent, label="label", image="file")
    assert len(data) == 12 and "img" in file_names(tmp_path / "c")
    write_rows(tmp_path / "test.tsv", ["x\ty", "1\ta"])
    data_error("holds files of several kinds: .csv, .tsv", "table", tmp_path, label="y")
    (tmp_path / "test.tsv").unlink()
    write_rows(tmp_path / "d" / "test.csv", ["x,y", "1,a"])
    data_error("has the parts test, and no training part", "table", tmp_path / "d", label="y")
