"""The command `report`: its flags, errors and files, and rows for a notebook."""

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
from support.files import path_digest
from support.launcher import Result, Session, clean_environment, read_events, read_metrics
from support.report_runs import add_class_counts, page_table, read_table


@pytest.fixture(scope="module")
def two(session: Session, small_run: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of pfedmoe and one of standalone; read only."""
    folder = tmp_path_factory.mktemp("two")
    for method in ("pfedmoe", "standalone"):
        assert (
            session(*small_run, "--algorithm", method, "--rounds", "2", "--run.dir", method, cwd=folder).code
            == 0
        )
        add_class_counts(folder / method)
    return folder


@pytest.fixture
def both(two: Path, tmp_path: Path) -> Path:
    """Copies of the two that a test may change."""
    return Path(shutil.copytree(two, tmp_path / "both"))


# Commands


def test_report_is_one_page_with_figures_and_tables(run_command: Callable[..., Result], both: Path) -> None:
    said = run_command("report", both / "pfedmoe").out
    folder = both / "pfedmoe" / "report"
    assert said == f"wrote {folder / 'report.html'}, 15 figures and 17 tables\n"
    figures = {
        "partition",
        "convergence",
        "clients",
        "gates",
        "gates_class",
        "gates_accuracy",
        "gates_spread",
        "seconds",
        "burden",
    }
    figures |= {"generalisation", "alpha_samples", "representations_class", "representations_client"}
    figures |= {"representations_own", "confusion"}
    for name in figures:
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
        assert (folder / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF-")
    assert {path.stem for path in (folder / "figures").iterdir()} == figures
    assert {path.suffix for path in (folder / "tables").iterdir()} == {".csv", ".tex"}
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 2 * len(figures) and "<script" not in text
    outside = set(re.findall(r'(?:src|href)="([^"#][^"]*)"', text)) - {"data:,"}
    assert all(address.startswith("data:image/png;base64,") for address in outside), outside


def test_report_works_without_gate_and_class_counts(run_command: Callable[..., Result], both: Path) -> None:
    lines = read_events(both / "standalone")
    del lines[0]["class_counts"], lines[0]["operations"]
    (both / "standalone" / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_command("report", both / "standalone", "--out", "out")
    names = {path.stem for path in (both.parent / "out" / "figures").iterdir()}
    seen = {"generalisation", "representations_own", "confusion"}
    assert names == {"convergence", "clients", "seconds", "burden", *seen}
    assert "did not record the classes of its clients" in (both.parent / "out" / "report.html").read_text()
    assert list(read_table(both.parent / "out", "target")[0]) == ["target", "round", "MB sent"]


def test_same_runs_give_the_same_files(run_command: Callable[..., Result], two: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_command("report", two, "--out", name)
    assert path_digest(tmp_path / "a") == path_digest(tmp_path / "b")


def test_report_replaces_an_earlier_report(
    run_command: Callable[..., Result], two: Path, tmp_path: Path
) -> None:
    run_command("report", two / "pfedmoe", "--out", "out")
    (tmp_path / "out" / "tables" / "mine.txt").write_text("a reader's own")
    run_command("report", two, "--out", "out")
    run_command("report", two, "--out", "fresh")
    (tmp_path / "out" / "tables" / "mine.txt").unlink()
    assert path_digest(tmp_path / "out") == path_digest(tmp_path / "fresh"), (
        "nothing of the earlier one is left"
    )


def test_interrupted_report_is_replaced(
    run_command: Callable[..., Result], assert_refused: Callable[..., str], two: Path, tmp_path: Path
) -> None:
    run_command("report", two, "--out", "out")
    (tmp_path / "out" / "report.html").rename(tmp_path / "out" / command.UNFINISHED)
    run_command("report", two, "--out", "out")
    assert (tmp_path / "out" / "report.html").exists()
    (tmp_path / "out" / "report.html").unlink()
    assert_refused("holds files that are not a report", "report", two, "--out", tmp_path / "out")


def test_folder_that_cannot_be_written_is_refused_first(
    assert_refused: Callable[..., str], two: Path
) -> None:
    """Before the models are evaluated; in /proc not even the superuser may create anything."""
    refused = assert_refused("/proc cannot be written", "report", two / "pfedmoe", "--out", "/proc/report")
    assert "evaluating" not in refused


def test_report_prints_on_a_terminal(run_command: Callable[..., Result], two: Path, tmp_path: Path) -> None:
    text = run_command("report", two, "--text", "true").out
    assert text.startswith("pfedmoe · standalone\n2 runs, seeds 0\n")
    for said in (
        "accuracy, %, by round",
        "  a  pfedmoe",
        "  b  standalone",
        "too few to tell",
        "Cost of a round",
    ):
        assert said in text, said
    finals = {name: read_metrics(two / name)[-1]["accuracy"]["mean"] for name in ("pfedmoe", "standalone")}
    best = max(finals, key=lambda name: finals[name])
    assert re.search(rf"^{best} +\*\*{100 * finals[best]:.2f}\*\*$", text, re.M)
    one = run_command("report", two / "pfedmoe", "--text", "true", "--target", "0.01").out
    assert re.search(r"^ +1\.00 +1 +\d+\.\d\d", one, re.M), "reached in round 1"
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_text_report_needs_no_extra_torch_or_mpi(two: Path) -> None:
    script = (
        "import sys; from pfedmoe_mpi.cli import main; "
        f"code = main(['report', {str(two)!r}, '--text', 'true']); "
        "print(sorted({'matplotlib', 'jinja2', 'torch', 'mpi4py'} & set(sys.modules)), code)"
    )
    command = [sys.executable, "-c", script]
    said = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, env=clean_environment("mpich", {})
    )
    assert said.stdout.splitlines()[-1] == "[] 0"


def test_wide_table_is_continued_below() -> None:
    columns = [tables.Column("method", words=True), *map(tables.Column, ("first number", "second", "third"))]
    made = tables.Table("t", "T", columns, [[tables.word("pfedmoe"), *map(tables.number, (1, 2, 3))]], ["n"])
    assert tables.to_text(made, 24).splitlines() == [
        *("T", "", "method   first number", "-------  ------------", "pfedmoe             1"),
        *("", "method   second  third", "-------  ------  -----", "pfedmoe       2      3", "(n)"),
    ]
    assert len(tables.to_text(made, 1).split("\n\n")) == 4, "one number at least"
    assert len(tables.to_text(made).splitlines()) == 6


def test_text_report_draws_the_curve() -> None:
    text = terminal.curve({"up": [(1, 0.0), (3, 1.0)], "flat": [(1, 0.5), (2, 0.5), (3, 0.5)]})
    lines = text.splitlines()
    assert lines[1] == "100.00 |" + " " * 59 + "a" and lines[12] == "  0.00 |a"
    assert lines[7].replace(" ", "") == "|bbb" and lines[14].split() == ["1", "3"]
    assert lines[15:] == ["  a  up", "  b  flat"]
    assert terminal.curve({"nothing": []}) == ""


# Mistakes


def test_report_errors_write_nothing(assert_refused: Callable[..., str], both: Path) -> None:
    run = both / "pfedmoe"
    (both / "foreign").mkdir()
    (both / "foreign" / "thesis.tex").write_text("")
    (both / "empty").mkdir()
    shutil.copy(run / "config.toml", both / "empty")
    assert_refused("report needs RUN_DIR", "report")
    assert_refused("gone does not exist", "report", both / "gone")
    assert_refused("is a file, not a run folder", "report", run / "config.toml")
    assert_refused("foreign is not a run folder: it has no config.toml", "report", both / "foreign")
    assert_refused("empty has no finished round yet", "report", both / "empty")
    assert_refused("is named twice", "report", run, both / "foreign" / ".." / "pfedmoe")
    assert_refused("report has no flag --rounds", "report", run, "--rounds", "3")
    assert_refused("--text: expected true or false, not .maybe.", "report", run, "--text", "maybe")
    for wrong in ("80", "0", "nan", "high"):
        assert_refused(f"--target = {wrong}: an accuracy is above 0", "report", run, "--target", wrong)
    assert_refused("--baseline = fedavg needs at least two runs", "report", run, "--baseline", "fedavg")
    assert_refused(
        "--baseline = standalon is not a method.*did you mean 'standalone'",
        "report",
        run,
        both / "standalone",
        "--baseline",
        "standalon",
    )
    assert_refused("holds files that are not a report", "report", run, "--out", both / "foreign")
    assert_refused("is a file", "report", run, "--out", both / "foreign" / "thesis.tex")


def test_duplicate_replicate_is_refused(assert_refused: Callable[..., str], both: Path) -> None:
    shutil.copytree(both / "pfedmoe", both / "copy")
    assert_refused("copy and .*pfedmoe have the same configuration and seed", "report", both)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.toml", "algorithm = ", "cannot read .*config.toml"),
        ("config.toml", "[tool]\nname = 1\n", "not the configuration of a run: it does not set algorithm"),
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
def test_unreadable_run_files_are_refused(
    assert_refused: Callable[..., str], both: Path, name: str, text: str, said: str
) -> None:
    (both / "pfedmoe" / name).write_text(text)
    assert_refused(said, "report", both / "pfedmoe")


def test_duplicate_row_is_reported(assert_refused: Callable[..., str], both: Path) -> None:
    path = both / "pfedmoe" / "metrics.jsonl"
    path.write_text(path.read_text() * 2)
    assert_refused("line 3 of .*metrics.jsonl is not the row of a round", "report", both / "pfedmoe")


def test_unfinished_run_is_marked(run_command: Callable[..., Result], both: Path) -> None:
    path = both / "pfedmoe" / "metrics.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{second[:50]}")  # killed while writing
    assert "unfinished: 1 of 2 rounds" in run_command("report", both / "pfedmoe", "--text", "true").out
    said = run_command("report", both, "--out", "out").out
    assert "note: left out of the tables, unfinished: pfedmoe, 1 of 2 rounds\n" in said
    marks = {row[0][0]: row[1] for row in page_table(both.parent / "out", "results")}
    assert marks["pfedmoe"][0] == "–" and marks["standalone"][1].split() == [], (
        "one value is not marked as best"
    )


def test_just_started_run_does_not_stop_a_report(
    run_command: Callable[..., Result], assert_refused: Callable[..., str], both: Path
) -> None:
    (both / "started").mkdir()
    shutil.copy(both / "pfedmoe" / "config.toml", both / "started")
    said = run_command("report", both, "--text", "true").out
    assert "2 runs" in said and f"note: left out: the run {both / 'started'} has no finished round" in said
    assert_refused("started has no finished round yet", "report", both / "pfedmoe", both / "started")
    for name in ("pfedmoe", "standalone"):
        (both / name / "metrics.jsonl").unlink()
    assert_refused("has no finished round yet", "report", both)


def test_report_works_on_an_unmeasured_run(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")  # measured in rounds 2 and 3 only
    assert "accuracy, round 1: –" in run_command("report", run, "--text", "true").out
    run_command("report", run, "--out", "out")
    assert (tmp_path / "out" / "figures" / "clients.png").stat().st_size > 1000


def test_names_are_escaped_in_the_page(
    run_command: Callable[..., Result], both: Path, tmp_path: Path
) -> None:
    name = r"$\frac{$ <b>&amp; x_1"
    for run in ("pfedmoe", "standalone"):
        path = both / run / "config.toml"
        path.write_text(path.read_text().replace('path = ""', f"path = '{name} {run}'", 1))
        assert name in load_run(both / run).config["data.path"]
    run_command("report", both, "--out", "out")
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<b>" not in text and r"data.path = $\frac{$ &lt;b&gt;&amp;amp; x_1 pfedmoe" in text
    latex = (tmp_path / "out" / "tables" / "results.tex").read_text()
    assert r"\$\textbackslash{}frac\{\$ <b>\&amp; x\_1 pfedmoe" in latex


# In a notebook


def test_load_run_returns_the_metrics(trained: Path) -> None:
    run = load_run(str(trained))
    history = read_metrics(trained)
    assert (run.algorithm, run.seed, run.done, run.planned, run.finished) == ("pfedmoe", 0, 3, 3, True)
    assert run.config["model.pool"] == ["mlp5", "mlp4"] and run.events == read_events(trained)
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


def test_numbers_of_clients_are_read_from_old_and_new_folders(
    assert_refused: Callable[..., str], run: Path, trained: Path
) -> None:
    """Rows of earlier versions have the clients' numbers themselves; now `measured` has them."""
    new, path = load_run(run).client_rows, run / "metrics.jsonl"
    assert all("clients" not in json.loads(line) for line in path.read_text().splitlines())
    joined = read_metrics(run)
    (run / "measured" / "000001.h5").unlink()
    assert "restart" in assert_refused("measured lacks .* of round 1", "report", run, "--text", "true")
    path.write_text("".join(json.dumps(row) + "\n" for row in joined))
    assert load_run(run).client_rows == new == load_run(trained).client_rows
