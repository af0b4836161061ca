"""Tables: features, codes from training rows alone, labels and clients by name, and bad files."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfedmoe_mpi import config
from pfedmoe_mpi.data.sources.open import open_dataset
from pfedmoe_mpi.errors import DataError
from pfedmoe_mpi.federation import effective, plan
from support.data_files import all_rows, data_error, open_data
from support.launcher import Result
from support.text_files import assert_restart_keeps_bits

HEADER = ["", "site", "age", "blood", "stage", "outcome", "note"]
ROWS = 90


def records() -> list[list[str]]:
    """Return patients as pandas writes them: row numbers without a name, missing values, three sites."""
    draw = np.random.default_rng(5)
    rows = []
    for number in range(ROWS):
        ill = int(draw.integers(2))
        age = f"{draw.normal(50 + 10 * ill, 5):.1f}" if draw.random() > 0.1 else ["?", "", "NA"][number % 3]
        blood = str(draw.choice(["A", "B", "AB"])) if draw.random() > 0.1 else ""
        stage = str(draw.choice([1, 2, 10]))
        outcome = ["well", "ill"][ill]
        rows.append(
            [str(number), str([9, 10, 100][number % 3]), age, blood, stage, outcome, f"seen {number}"]
        )
    return rows


def write_table(path: Path, rows: list[list[str]], header: list[str] = HEADER, separator: str = ",") -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "patients.csv", records())


NAMED = {"label": "outcome", "client": "site", "categorical": ("stage",), "ignore": ("note",)}


def test_columns_labels_and_clients_are_known_by_name(table: Path) -> None:
    data = open_data("table", table, **NAMED)
    assert data.class_names == ("ill", "well") and data.client_names == ("9", "10", "100")
    assert data.proposals == {"partition.kind": "natural"}
    x, rows = all_rows(data), records()
    assert [data.class_names[y] for y in data.labels] == [row[5] for row in rows]
    assert data.client is not None and [data.client_names[k] for k in data.client] == [row[1] for row in rows]
    blood = {"A": [1, 0, 0], "AB": [0, 1, 0], "B": [0, 0, 1], "": [np.nan] * 3}
    stage = {"1": [1, 0, 0], "2": [0, 1, 0], "10": [0, 0, 1]}
    ages = [np.nan if row[2] in {"?", "", "NA"} else float(row[2]) for row in rows]
    expected = [[age, *blood[row[3]], *stage[row[4]]] for age, row in zip(ages, rows, strict=True)]
    assert np.array_equal(x, np.array(expected, np.float32), equal_nan=True)
    assert data.left_out == (
        "column 'note': named by data.ignore",
        "column '': row numbers without a name",
    )


def test_tsv_holds_the_same_data(table: Path, tmp_path: Path) -> None:
    data = open_data("table", table, **NAMED)
    tsv = open_data("table", write_table(tmp_path / "patients.tsv", records(), separator="\t"), **NAMED)
    assert np.array_equal(all_rows(data), all_rows(tsv), equal_nan=True)


def test_parquet_holds_the_same_data(table: Path, tmp_path: Path) -> None:
    data = open_data("table", table, **NAMED)
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    columns: dict[str, Any] = dict(zip(HEADER, map(list, zip(*records(), strict=True)), strict=True))
    columns["age"] = [None if age in {"?", "", "NA"} else float(age) for age in columns["age"]]
    columns["blood"] = arrow.array([blood or None for blood in columns["blood"]]).dictionary_encode()
    columns["stage"], columns["site"] = map(int, columns["stage"]), map(int, columns["site"])
    columns = {name or "__index_level_0__": column for name, column in columns.items()}
    parquet.write_table(
        arrow.table({k: v if k == "blood" else list(v) for k, v in columns.items()}), tmp_path / "p.parquet"
    )
    stored = open_data("table", tmp_path / "p.parquet", **NAMED)
    assert np.array_equal(all_rows(data), all_rows(stored), equal_nan=True)
    assert (stored.class_names, stored.client_names) == (data.class_names, data.client_names)
    assert np.array_equal(stored.labels, data.labels) and np.array_equal(stored.client, data.client)


def settings(path: Path, **changes: Any) -> config.Config:
    given = {f"data.{name}": value for name, value in NAMED.items()}
    return config.build({**given, "data.source": "table", "data.path": str(path), **changes})


def test_a_code_without_training_rows_has_no_column(table: Path, tmp_path: Path) -> None:
    """The blood group of one test row is changed to a new one: the other rows stay the same, bit for bit."""
    made = settings(table)
    data = open_dataset(made.data, 0, clients=3)
    partition = plan.draw_partition(effective.apply_proposals(made, data), data)
    fitted = data.fitted(partition)
    changed = int(partition.test[1][0])
    rows = records()
    rows[changed][3] = "rare"
    other = open_data("table", write_table(tmp_path / "other.csv", rows), **NAMED)
    assert other.shape == (data.shape[0] + 1,), "before the fit every code has a column"
    refitted = other.fitted(partition)
    assert refitted.shape == fitted.shape == (7,)
    same = np.arange(ROWS) != changed
    assert np.array_equal(all_rows(fitted)[same], all_rows(refitted)[same])
    train = partition.train[1]
    none = 0 - np.array([[row[3] == "A", row[3] == "AB", row[3] == "B"] for row in rows])[train].mean(axis=0)
    assert (np.sign(all_rows(refitted)[changed, 1:4]) == np.sign(none)).all()


def test_columns_that_say_nothing_are_left_out(tmp_path: Path) -> None:
    rows = [[str(k + 7), "x", "", f"name {k}", str(k % 5), "ab"[k % 2]] for k in range(1200)]
    path = write_table(tmp_path / "t.csv", rows, ["id", "same", "none", "text", "good", "label"])
    data = open_data("table", path, label="label")
    assert data.shape == (1,) and data.client is None and not data.proposals
    assert data.left_out == (
        "column 'id': row numbers",
        "column 'same': the same value in every row",
        "column 'none': no value in any row",
        "column 'text': more than 1000 different texts",
    )


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["2", "10", "-1"], ("-1", "2", "10")),
        (["2.0", "10.0", "2"], ("2", "10")),
        (["2", "10", "b"], ("10", "2", "b")),
        (["007", "7", "8"], ("007", "7", "8")),
    ],
)
def test_labels_sort_as_numbers_if_all_are_numbers(tmp_path: Path, labels: list[str], names: Any) -> None:
    rows = [[str(k * k), label] for k, label in enumerate(labels * 3)]
    data = open_data("table", write_table(tmp_path / "t.csv", rows, ["x", "y"]), label="y")
    assert data.class_names == names
    assert data.class_names[data.labels[0]] == labels[0].removesuffix(".0")


def test_ranks_and_restart_keep_the_bits_of_a_table(
    run_command: Callable[..., Result], table: Path, tmp_path: Path
) -> None:
    flags = ("--data.source", "table", "--data.path", str(table), "--data.label", "outcome")
    flags += ("--data.client", "site", "--data.categorical", "stage", "--rounds", "2", "--model.dim", "16")
    newest = assert_restart_keeps_bits(run_command, (*flags, "--train.device", "cpu"), tmp_path)
    assert '"accuracy"' in run_command("evaluate", newest, "--json", "true").out


# Bad files


@pytest.mark.parametrize(
    ("content", "given", "pattern"),
    [
        ("", {"label": "y"}, "t.csv is empty"),
        ("x,y\n", {"label": "y"}, "no row below its header"),
        ("x,y\n1,a\n", {}, "data.label is empty; .* has the columns x, y(.|\n)*--data.label 'y'"),
        ("age,y\n1,a\n", {"label": "aeg"}, "data.label = aeg, but .*did you mean 'age'"),
        ("x,y\n1,a\n", {"label": "y", "client": "y"}, "data.label and data.client both name the column 'y'"),
        ("x,x,y\n1,1,a\n", {"label": "y"}, "two columns named 'x'"),
        ("x,y\n1,a\n1,2,b\n", {"label": "y"}, "line 3 has 3 values, and the header names 2"),
        ("x;y\n1;a\n", {"label": "y"}, "commas separate .* has semicolons"),
        ("x,y\n1,a\n2,?\n", {"label": "y"}, "label is missing in line 3"),
        ("c,x,y\n1,1,a\n,2,b\n", {"label": "y", "client": "c"}, "client is missing in line 3"),
        ("x,y\n1,a\n1 000,b\n", {"label": "y"}, "column 'x' has numbers, but '1 000' in line 3"),
        ("x,y\n1,a\ninf,b\n", {"label": "y"}, "line 3: x = inf is not a finite number"),
        ("x,y\n1,a\n1e39,b\n", {"label": "y"}, "line 3: x = 1e39 is not a finite number"),
        ("x,y\n1,0.5\n2,0.25\n", {"label": "y"}, "2 different numbers there, such as 0.25"),
        ("y,z\na,1\nb,1\n", {"label": "y"}, "no feature beside its label"),
        ("x,y\n1,a\n2,a\n4,a\n", {"label": "y"}, "hold one class only"),
        (b"x,y\n1,a\n2,\xe9\n", {"label": "y"}, "line 3: byte 0xe9 is not UTF-8"),
        ('x,y\n1,"' + "a" * (1 << 24), {"label": "y"}, "line 2: this row has more than"),
    ],
)
def test_bad_table_is_reported_with_its_line(
    tmp_path: Path, content: str | bytes, given: dict[str, str], pattern: str
) -> None:
    raw = content.encode() if isinstance(content, str) else content
    (tmp_path / "t.csv").write_bytes(raw)
    data_error(pattern, "table", tmp_path / "t.csv", **given)


def test_columns_without_a_table_are_refused(table: Path) -> None:
    data_error("data.label names columns of a table, but data.source = text", "text", table, label="outcome")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    data_error(r"needs pyarrow(.|\n)*pfedmoe_mpi\[tables\]", "table", tmp_path / "t.parquet", label="y")


def test_columns_of_too_many_codes_are_refused_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfedmoe_mpi.data.sources.table._VALUES", 1000)
    path = write_table(tmp_path / "t.csv", [[f"c{k % 40}", "ab"[k % 2]] for k in range(80)], ["code", "y"])
    data_error(
        "are 3,200 values, more than 1,000; 'code' has 40(.|\n)*--data.ignore 'code'",
        "table",
        path,
        label="y",
    )


def test_hostile_parquet_is_refused(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    parquet.write_table(arrow.table({"x": [1.0, 2.0] * 50, "y": ["a", "b"] * 50}), path)
    raw = path.read_bytes()
    draw = np.random.default_rng(0)
    for number in range(300):
        damaged = bytearray(raw)
        for place in draw.integers(0, len(raw), 3):
            damaged[place] = draw.integers(256)
        if number < 20:
            damaged = damaged[: draw.integers(len(raw))]
        path.write_bytes(damaged)
        with suppress(DataError):
            open_data("table", path, label="y")
    parquet.write_table(
        arrow.table({"x": np.zeros(20_000_000, np.int8), "y": np.zeros(20_000_000, np.int8)}), path
    )
    data_error("claims .* bytes, more than 100 times the file", "table", path, label="y")
    parquet.write_table(arrow.table({"x": [[1], [2]], "y": ["a", "b"]}), path)
    data_error("column 'x' is list", "table", path, label="y")
