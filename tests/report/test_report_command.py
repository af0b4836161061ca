"""Reports as their users meet them: commands, mistakes, files, rows for a notebook."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pfedmoe_mpi.report import command, tables, terminal
from pfedmoe_mpi.report.load import load_run
from support.launcher import Result, Session, digest, environment, events, rows
from support.report_runs import shown, table, tell_classes


@pytest.fixture(scope="module")
def two(session: Session, small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of pfedmoe and one of standalone; only to be read."""
    folder = tmp_path_factory.mktemp("two")
    for method in ("pfedmoe", "standalone"):
        assert (
            session(*small, "--algorithm", method, "--rounds", "2", "--run.dir", method, cwd=folder).code == 0
        )
        tell_classes(folder / method)
    return folder


@pytest.fixture
def both(two: Path, tmp_path: Path) -> Path:
    """Copies of the two, for a test to change."""
    return Path(shutil.copytree(two, tmp_path / "both"))


# Commands


def test_a_report_is_one_page_with_figures_and_tables(done: Callable[..., Result], both: Path) -> None:
    said = done("report", both / "pfedmoe").out
    folder = both / "pfedmoe" / "report"
    assert said == f"wrote {folder / 'report.html'}, 11 figures and 13 tables\n"
    figures = {"partition", "convergence", "clients", "gates", "gates_class", "seconds", "burden"}
    figures |= {"generalisation", "alpha_samples", "representations_class", "representations_client"}
    for name in figures:
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
        assert (folder / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF-")
    assert {path.stem for path in (folder / "figures").iterdir()} == figures
    assert {path.suffix for path in (folder / "tables").iterdir()} == {".csv", ".tex"}
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.count("<svg") == len(figures) and "<script" not in text
    outside = set(re.findall(r'(?:src|href)="([^"#][^"]*)"', text)) - {"data:,"}
    assert all(address.startswith("data:image/png;base64,") for address in outside), outside


def test_a_method_without_a_gate_and_without_class_counts(done: Callable[..., Result], both: Path) -> None:
    lines = events(both / "standalone")
    del lines[0]["class_counts"], lines[0]["multiply_adds"]
    (both / "standalone" / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done("report", both / "standalone", "--out", "out")
    names = {path.stem for path in (both.parent / "out" / "figures").iterdir()}
    seen = {"generalisation", "representations_class", "representations_client"}
    assert names == {"convergence", "clients", "seconds", "burden", *seen}
    assert "does not tell its clients" in (both.parent / "out" / "report.html").read_text()
    assert list(table(both.parent / "out", "target")[0]) == ["target", "round", "MB sent"]


def test_the_same_runs_give_the_same_files(done: Callable[..., Result], two: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        done("report", two, "--out", name)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_a_report_replaces_an_earlier_one(done: Callable[..., Result], two: Path, tmp_path: Path) -> None:
    done("report", two / "pfedmoe", "--out", "out")
    (tmp_path / "out" / "tables" / "mine.txt").write_text("a reader's own")
    done("report", two, "--out", "out")
    done("report", two, "--out", "fresh")
    (tmp_path / "out" / "tables" / "mine.txt").unlink()
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh"), "nothing of the earlier one is left"


def test_a_report_that_was_interrupted_is_replaced(
    done: Callable[..., Result], refused: Callable[..., str], two: Path, tmp_path: Path
) -> None:
    done("report", two, "--out", "out")
    (tmp_path / "out" / "report.html").rename(tmp_path / "out" / command.UNFINISHED)
    done("report", two, "--out", "out")
    assert (tmp_path / "out" / "report.html").exists()
    (tmp_path / "out" / "report.html").unlink()
    refused("holds something else than a report", "report", two, "--out", tmp_path / "out")


def test_on_a_terminal(done: Callable[..., Result], two: Path, tmp_path: Path) -> None:
    text = done("report", two, "--text", "true").out
    assert text.startswith("pfedmoe · standalone\n2 runs, seeds 0\n")
    for said in (
        "accuracy, %, by round",
        "  a  pfedmoe",
        "  b  standalone",
        "too few to tell",
        "Cost of a round",
    ):
        assert said in text, said
    finals = {name: rows(two / name)[-1]["accuracy"]["mean"] for name in ("pfedmoe", "standalone")}
    best = max(finals, key=lambda name: finals[name])
    assert re.search(rf"^{best} +\*\*{100 * finals[best]:.2f}\*\*$", text, re.M)
    one = done("report", two / "pfedmoe", "--text", "true", "--target", "0.01").out
    assert re.search(r"^ +1\.00 +1 +\d+\.\d\d", one, re.M), "reached in round 1"
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_the_terminal_needs_no_extra_no_torch_and_no_mpi(two: Path) -> None:
    script = (
        "import sys; from pfedmoe_mpi.cli import main; "
        f"code = main(['report', {str(two)!r}, '--text', 'true']); "
        "print(sorted({'matplotlib', 'jinja2', 'torch', 'mpi4py', 'h5py'} & set(sys.modules)), code)"
    )
    command = [sys.executable, "-c", script]
    said = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, env=environment("mpich", {})
    )
    assert said.stdout.splitlines()[-1] == "[] 0"


def test_a_wide_table_goes_on_below() -> None:
    columns = [tables.Column("method", words=True), *map(tables.Column, ("first number", "second", "third"))]
    made = tables.Table("t", "T", columns, [[tables.word("pfedmoe"), *map(tables.number, (1, 2, 3))]], ["n"])
    assert tables.to_text(made, 24).splitlines() == [
        *("T", "", "method   first number", "-------  ------------", "pfedmoe             1"),
        *("", "method   second  third", "-------  ------  -----", "pfedmoe       2      3", "(n)"),
    ]
    assert len(tables.to_text(made, 1).split("\n\n")) == 4, "one number at least"
    assert len(tables.to_text(made).splitlines()) == 6


def test_the_curve() -> None:
    text = terminal.curve({"up": [(1, 0.0), (3, 1.0)], "flat": [(1, 0.5), (2, 0.5), (3, 0.5)]})
    lines = text.splitlines()
    assert lines[1] == "100.00 |" + " " * 59 + "a" and lines[12] == "  0.00 |a"
    assert lines[7].replace(" ", "") == "|bbb" and lines[14].split() == ["1", "3"]
    assert lines[15:] == ["  a  up", "  b  flat"]
    assert terminal.curve({"nothing": []}) == ""


# Mistakes


def test_mistakes_are_told_and_nothing_is_written(refused: Callable[..., str], both: Path) -> None:
    run = both / "pfedmoe"
    (both / "foreign").mkdir()
    (both / "foreign" / "thesis.tex").write_text("")
    (both / "empty").mkdir()
    shutil.copy(run / "config.toml", both / "empty")
    refused("report needs RUN_DIR", "report")
    refused("there is no run folder .*gone", "report", both / "gone")
    refused("is a file, not a run folder", "report", run / "config.toml")
    refused("foreign is not a run folder: it has no config.toml", "report", both / "foreign")
    refused("empty has no finished round yet", "report", both / "empty")
    refused("is named twice", "report", run, both / "foreign" / ".." / "pfedmoe")
    refused("report has no flag --rounds", "report", run, "--rounds", "3")
    refused("--text: expected true or false, not .maybe.", "report", run, "--text", "maybe")
    for wrong in ("80", "0", "nan", "high"):
        refused(f"--target {wrong}: an accuracy is above 0", "report", run, "--target", wrong)
    refused("nothing to compare with a baseline", "report", run, "--baseline", "fedavg")
    refused(
        "there is no method 'standalon'.*did you mean 'standalone'",
        "report",
        run,
        both / "standalone",
        "--baseline",
        "standalon",
    )
    refused("holds something else than a report", "report", run, "--out", both / "foreign")
    refused("is a file", "report", run, "--out", both / "foreign" / "thesis.tex")


def test_a_replicate_counts_once(refused: Callable[..., str], both: Path) -> None:
    shutil.copytree(both / "pfedmoe", both / "copy")
    refused("copy and .*pfedmoe are the same configuration and seed", "report", both)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.toml", "algorithm = ", "config.toml cannot be read"),
        ("config.toml", "[tool]\nname = 1\n", "not the configuration of a run: it has no algorithm"),
        (
            "metrics.jsonl",
            '{"loss": 1}\n{"loss": 2}\n',
            "line 1 of .*metrics.jsonl is not the row of a round",
        ),
        ("metrics.jsonl", "[]\n", "line 1 of .*metrics.jsonl is not"),
        (
            "metrics.jsonl",
            '{"round": 1, "accuracy": {"mean": null}, "accuracy_cohort": {"mean": null}, "seconds": {}, '
            '"bytes": {}, "clients": {"accuracy": [], "loss": [], "alpha": [], "samples": []}}\n',
            "line 1 of .*metrics.jsonl is not",
        ),
        ("metrics.jsonl", "half", "no finished round yet"),
    ],
)
def test_files_of_another_program(
    refused: Callable[..., str], both: Path, name: str, text: str, said: str
) -> None:
    (both / "pfedmoe" / name).write_text(text)
    refused(said, "report", both / "pfedmoe")


def test_a_row_twice_is_told(refused: Callable[..., str], both: Path) -> None:
    path = both / "pfedmoe" / "metrics.jsonl"
    path.write_text(path.read_text() * 2)
    refused("line 3 of .*metrics.jsonl is not the row of a round", "report", both / "pfedmoe")


def test_an_unfinished_run(done: Callable[..., Result], both: Path) -> None:
    path = both / "pfedmoe" / "metrics.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{second[:50]}")  # killed while writing
    assert "unfinished: 1 of 2 rounds" in done("report", both / "pfedmoe", "--text", "true").out
    said = done("report", both, "--out", "out").out
    assert "note: left out of the tables, unfinished: pfedmoe, 1 of 2 rounds\n" in said
    marks = {row[0][0]: row[1] for row in shown(both.parent / "out", "results")}
    assert marks["pfedmoe"][0] == "–" and marks["standalone"][1].split() == [], "one value alone is no best"


def test_a_run_that_has_just_started_stops_no_report_on_its_folder(
    done: Callable[..., Result], refused: Callable[..., str], both: Path
) -> None:
    (both / "started").mkdir()
    shutil.copy(both / "pfedmoe" / "config.toml", both / "started")
    said = done("report", both, "--text", "true").out
    assert "2 runs" in said and f"note: left out: the run {both / 'started'} has no finished round" in said
    refused("started has no finished round yet", "report", both / "pfedmoe", both / "started")
    for name in ("pfedmoe", "standalone"):
        (both / name / "metrics.jsonl").unlink()
    refused("has no finished round yet", "report", both)


def test_a_run_that_was_never_measured(done: Callable[..., Result], run: Path, tmp_path: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")  # measured in rounds 2 and 3 only
    assert "accuracy, round 1: –" in done("report", run, "--text", "true").out
    done("report", run, "--out", "out")
    assert (tmp_path / "out" / "figures" / "clients.png").stat().st_size > 1000


def test_names_are_shown_as_they_are(done: Callable[..., Result], both: Path, tmp_path: Path) -> None:
    name = r"$\frac{$ <b>&amp; x_1"
    for run in ("pfedmoe", "standalone"):
        path = both / run / "config.toml"
        path.write_text(path.read_text().replace('path = ""', f"path = '{name} {run}'", 1))
        assert name in load_run(both / run).config["data.path"]
    done("report", both, "--out", "out")
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<b>" not in text and r"data.path = $\frac{$ &lt;b&gt;&amp;amp; x_1 pfedmoe" in text
    latex = (tmp_path / "out" / "tables" / "results.tex").read_text()
    assert r"\$\textbackslash{}frac\{\$ <b>\&amp; x\_1 pfedmoe" in latex


# In a notebook


def test_load_run(trained: Path) -> None:
    run = load_run(str(trained))
    history = rows(trained)
    assert (run.algorithm, run.seed, run.done, run.planned, run.finished) == ("pfedmoe", 0, 3, 3, True)
    assert run.config["model.pool"] == ["mlp5", "mlp4"] and run.events == events(trained)
    assert [row["accuracy.mean"] for row in run.rows] == [row["accuracy"]["mean"] for row in history]
    assert not any(isinstance(value, dict) for row in [*run.rows, *run.client_rows] for value in row.values())
    assert len({tuple(row) for row in run.rows}) == len({tuple(row) for row in run.client_rows}) == 1
    assert len(run.client_rows) == 3 * 4 and run.rows[0]["drift.recovery"] is None
    for row in run.client_rows:
        raw = history[row["round"] - 1]["clients"]
        assert (row["accuracy"], row["alpha"]) == (
            raw["accuracy"][row["client"]],
            raw["alpha"][row["client"]],
        )
        assert row["architecture"] == ("mlp5", "mlp4")[row["client"] % 2]
