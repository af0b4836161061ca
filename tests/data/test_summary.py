"""What a source took the data to be: said once, for every kind of source, without what a terminal obeys."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from support.data_files import open_data, write_h5, write_image_folder
from support.launcher import run_program, shared_session


def write_table(path: Path) -> Path:
    rows = [f"{k},{k % 7 if k % 5 else ''},{k % 2},{'north' if k < 30 else 'south'}" for k in range(40)]
    path.write_text("\n".join(["id,x,y,site", *rows]), encoding="utf-8")
    return path


def test_samples_classes_clients_and_what_is_left_out(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv")
    assert open_data("table", path, label="y", client="site").summary == (
        f"data: {path}: 40 samples of 1 numbers from 0 to 6, 20.0% missing",
        "data: 2 classes (samples): 0 (20), 1 (20)",
        "data: 2 clients of their own: north, south",
        "data: left out: column 'id': row numbers",
    )


def test_range_is_read_from_few_rows_of_a_file(tmp_path: Path) -> None:
    x = np.full((2000, 3), 7, np.uint8)
    x[0], x[-1], x[5] = 2, 250, 255
    path = write_h5(tmp_path / "a.h5", x=x, y=np.arange(2000) % 12, client=np.arange(2000) % 3)
    with h5py.File(path, "r+") as file:
        file["official_test"] = np.arange(2000) % 4 == 0
    assert open_data("hdf5", path).summary == (
        f"data: {path}: 2,000 samples of 3 bytes from 2 to 250 in 64 of them",
        "data: 12 classes (samples): "
        + ", ".join(f"{k} ({167 if k < 8 else 166})" for k in range(10))
        + ", …",
        "data: 3 clients of their own without names",
        "data: 500 samples are the official test part",
    )


def test_names_are_shown_as_a_terminal_can_print_them(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "images", {"\x1b[2J": 2, "b" * 60: 2})
    assert open_data("folder", root).summary[1] == (
        f"data: 2 classes (samples): '\\x1b[2J' (2), {'b' * 40}… (2)"
    )


def test_texts_have_no_range(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("1,a b\n2,c\n" * 3)
    assert open_data("text", tmp_path / "t.csv").summary[0].endswith("6 samples of 64 tokens")


def test_two_ranks_say_it_once(tmp_path: Path) -> None:
    flags = ("--data.source", "table", "--data.path", write_table(tmp_path / "t.csv"), "--data.label", "y")
    flags += ("--data.client", "site", "--train.device", "cpu", "--model.dim", "16")
    result = shared_session(2)(*map(str, flags), "--dry", "true", cwd=tmp_path)
    assert result.code == 0 and result.out.count("data: 2 clients of their own: north, south") == 1
    result = run_program(0, "data", "partition", "p.h5", *map(str, flags), cwd=tmp_path)
    assert result.err.count("data: left out: column 'id': row numbers") == 1 and result.out.startswith(
        "client"
    )
