"""Reports as their users meet them: commands, mistakes, files, rows for a notebook, grouping, statistics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
from launcher import Result, Session, digest, environment, events, rows
from report_runs import shown, table, tell_classes

from pfedmoe_mpi import load_run
from pfedmoe_mpi.report import (
    command,
    compare,
    costs,
    drawing,
    figures,
    page,
    sections,
    several,
    single,
    tables,
    terminal,
    versus,
)
from pfedmoe_mpi.report.load import Run


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
    assert list(table(both.parent / "out", "target")[0]) == ["target, %", "round", "MB sent"]


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
    refused("report on which runs", "report")
    refused("there is no run folder .*gone", "report", both / "gone")
    refused("is a file, not a run folder", "report", run / "config.toml")
    refused("foreign is not a run folder: it has no config.toml", "report", both / "foreign")
    refused("empty has no finished round yet", "report", both / "empty")
    refused("is named twice", "report", run, both / "foreign" / ".." / "pfedmoe")
    refused("report takes no --rounds", "report", run, "--rounds", "3")
    refused("--text maybe: neither true nor false", "report", run, "--text", "maybe")
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


# Grouping and statistics


def like(run: Run, path: str, **changes: Any) -> Run:
    """The same run under other settings; `__` stands for the dot."""
    config = {**run.config, **{name.replace("__", "."): value for name, value in changes.items()}}
    return Run(Path(path), config, run.history, run.events)


def test_what_varies_within_a_method_names_it(trained: Path) -> None:
    run = load_run(trained)
    found = compare.compare(
        [
            like(run, "a", run__dir="x", train__threads=2),
            like(run, "b", seed=1),
            like(run, "c", pfedmoe__share=False),
            like(run, "d", algorithm="standalone", train__lr=0.01),
            like(run, "e", clients=100, participation=0.1),
            like(run, "f", clients=20, participation=0.1),
        ]
    )
    labels = [(group.method, group.setting, len(group.runs)) for group in found.groups]
    share, unshared = "pfedmoe (share = true)", "pfedmoe (share = false)"
    plain = "clients = 4"
    assert labels[:3] == [(share, plain, 2), (unshared, plain, 1), ("standalone", plain, 1)]
    assert [label[1] for label in labels[3:]] == [f"clients = {n}" for n in (20, 100)]
    assert found.notes == (
        "differing between settings as well: participation (1.0; 0.1)",
        f"train.lr differs between methods: pfedmoe {run.config['train.lr']}; standalone 0.01",
    )
    assert found.baseline("") == found.baseline("standalone") == "standalone"
    with pytest.raises(compare.CompareError, match="'pfedmoe' means several methods"):
        found.baseline("pfedmoe")


def test_most_variants_name_a_method_and_settings_name_no_variant(trained: Path) -> None:
    run = load_run(trained)
    wide, deep = like(run, "b", gate__hidden=128), like(run, "c", gate__layers=3)
    other = like(run, "d", data__name="MNIST", train__augment=["flip"])
    found = compare.compare([run, wide, deep, other, like(other, "e", algorithm="standalone")])
    assert {(group.setting, group.method) for group in found.groups} == {
        *(
            ("data.name = CIFAR10", f"pfedmoe{more}")
            for more in ("", " (gate.hidden = 128)", " (gate.layers = 3)")
        ),
        *(("data.name = MNIST", method) for method in ("pfedmoe", "standalone")),
    }
    assert found.notes == (
        "pfedmoe, where its name does not say otherwise: gate.hidden = 64, gate.layers = 2",
        "differing between settings as well: train.augment (none; flip)",
    )


def test_data_name_a_setting_before_what_comes_with_them(trained: Path) -> None:
    run = load_run(trained)
    found = compare.compare([run, like(run, "b", data__source="heart", clients=10, rounds=8)])
    assert found.settings == ["data.source = heart", "data.source = synthetic"]
    assert found.notes == ("differing between settings as well: rounds (3; 8), clients (4; 10)",)


def test_other_models_are_another_setting_where_a_method_has_several(trained: Path) -> None:
    run = load_run(trained)
    same = like(run, "b", model__pool=["mlp5"])
    found = compare.compare([run, same, like(same, "c", algorithm="fedavg")])
    assert set(found.settings) == {"model.pool = mlp5,mlp4", "model.pool = mlp5"}
    assert [group.method for group in found.of("model.pool = mlp5")] == ["pfedmoe", "fedavg"]


@pytest.mark.parametrize(
    ("freedom", "expected"),  # published quantiles of Student's t
    [(1, 12.70620), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227), (100, 1.98397)],
)
def test_students_quantile(freedom: int, expected: float) -> None:
    assert compare.t_quantile(freedom) == pytest.approx(expected, abs=5e-6)


def test_what_is_sent_once_goes_to_new_members(trained: Path) -> None:
    run = load_run(trained)
    cohorts = [[0, 1], [1, 2], [0, 2]]
    history = [
        {**row, "cohort": cohort, "lost": cohort[:1], "bytes": {"up": 10.0, "down": 100.0, "once": 1000}}
        for row, cohort in zip(run.history, cohorts, strict=True)
    ]
    sent = costs.traffic(Run(run.path, run.config, history, run.events))
    assert [(t.up, t.down, t.once) for t in sent] == [(10, 200, 2000), (10, 200, 1000), (10, 200, 0)]


def test_equal_values_have_no_spread() -> None:
    """In floating point the mean of 0.1, 0.1 and 0.1 is another number."""
    assert compare.mean_std([0.1] * 3) == (0.1, 0.0)
    assert [several.plain_spread(values).text for values in ([0.1] * 3, [53.14] * 6)] == ["0.1", "53.14"]


def test_numbers_are_short_and_units_fit() -> None:
    shown = [tables.short(value) for value in (0.0, 0.012345, 1.0, 999.96, 12345.6, 1e6)]
    assert shown == ["0", "0.01235", "1", "1000", "12346", "1000000"]
    assert [single.size(count) for count in (0, 999, 999.7, 999_600)] == ["0 B", "999 B", "1 kB", "1 MB"]


@pytest.mark.parametrize("top", [0.29, 0.57, 0.6999999999999999, 0.7, 1.0])
def test_what_is_reachable_is_reached(trained: Path, top: float) -> None:
    run = load_run(trained)
    row = {**run.history[-1], "accuracy": {**run.history[-1]["accuracy"], "mean": top}}
    changed = Run(run.path, run.config, [row], run.events)
    target = costs.reachable([changed])
    assert target is not None and costs.reached(changed, target) and not costs.reached(changed, target + 0.01)


def test_a_seed_that_has_just_started_cuts_no_curve(trained: Path) -> None:
    run = load_run(trained)
    started = Run(Path("b"), {**run.config, "seed": 1}, run.history[:2], run.events)
    (group,) = compare.compare([run, started]).groups
    assert compare.curve(group)[0].tolist() == [2, 3] and len(group.drawn) == 1
    (alone,) = compare.compare([started]).groups
    assert compare.curve(alone)[0].tolist() == [2]


def test_clients_that_have_not_trained_are_in_no_mean(trained: Path) -> None:
    """Client 3 never trains, client 2 joins in round 3: of the two architectures of 0 to 3 each lacks one."""
    run = load_run(trained)
    told = json.dumps({"absent": [[3], [2]]})
    events = [{**run.events[0], "samples": told}]
    run = Run(run.path, {**run.config, "join.round": 3}, run.history, events)
    assert [run.absent(round) for round in (2, 3)] == [{2, 3}, {3}]
    accuracy = figures.column(run, "accuracy")
    assert np.isnan(accuracy).tolist() == [
        [True] * 4,
        [False, False, True, True],
        [False, False, False, True],
    ]
    (found,) = [table for table in single.report(run, None).tables if table.name == "architectures"]
    assert [row[1].text for row in found.rows] == ["2", "1"]
    (clients,) = [table for table in single.report(run, None).tables if table.name == "clients"]
    assert clients.rows[-1][0].text == "3" and "in no mean over clients: 3" in clients.notes[0]
    other = Run(Path("b"), {**run.config, "algorithm": "standalone"}, run.history, run.events)
    pair = compare.compare([run, other]).groups
    assert np.isnan(compare.client_differences(*pair)).tolist() == [False, False, False, True]


def test_a_restart_tells_what_was_otherwise(trained: Path) -> None:
    run = load_run(trained)
    start = run.events[0]
    again = Run(
        run.path, run.config, run.history, [start, {**start, "event": "restart", "ranks": 4, "torch": "9"}]
    )
    (found,) = [table for table in single.report(again, None).tables if table.name == "events"]
    assert [row[3].text for row in found.rows] == ["", "ranks: 4; torch: 9"]


def test_axes_of_counts_have_whole_numbers(trained: Path) -> None:
    axes = matplotlib.figure.Figure().subplots()
    axes.plot([1], [1])
    figures.whole_numbers(axes.xaxis)
    assert [tick for tick in axes.get_xticks() if 0.9 < tick < 1.1] == [1]


def test_evaluation_takes_time_where_there_was_one(trained: Path) -> None:
    canvas = matplotlib.figure.Figure()
    figures.seconds(load_run(trained)).draw(canvas, drawing.PAPER)
    (line,) = [line for line in canvas.axes[0].lines if line.get_label() == "evaluate"]
    assert list(line.get_xdata()) == [2, 3], "measured every second round, and in the last"


def test_what_looks_equal_is_marked_alike(trained: Path) -> None:
    run = load_run(trained)
    found = []
    for number, value in enumerate((0.70001, 0.70002, 0.6)):
        row = {**run.history[-1], "accuracy": {**run.history[-1]["accuracy"], "mean": value}}
        found.append(Run(Path(str(number)), {**run.config, "algorithm": f"m{number}"}, [row], run.events))
    shown = several.results(compare.compare(found)).rows
    assert [row[1].mark for row in shown] == ["best", "best", "second"]


def test_equal_values_rank_alike() -> None:
    assert tables.ranks([0.5, None, 0.7, 0.7, 0.2]) == ["second", "", "best", "best", ""]
    assert tables.ranks([0.5, None]) == ["", ""]


def test_latex_takes_any_name() -> None:
    columns = [tables.Column("50 % & more", words=True), tables.Column("x_1")]
    made = tables.Table(
        "t", "T", columns, [[tables.word(r"a\b {c}^~#$"), tables.Cell("−1 ± 2", (1,), "best")]]
    )
    lines = tables.to_latex(made).splitlines()
    assert lines[2:4] == [r"\begin{tabular}{lr}", r"\toprule"] and lines[-1] == r"\end{tabular}"
    assert lines[4] == r"50 \% \& more & x\_1 \\"
    escaped = r"a\textbackslash{}b \{c\}\textasciicircum{}\textasciitilde{}\#\$"
    assert lines[6] == escaped + r" & \textbf{$-$1 $\pm$ 2} \\"


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


def test_a_legend_is_no_formula(trained: Path) -> None:
    run = load_run(trained)
    found = compare.compare([run, like(run, "b", train__augment=[r"$\frac{$ --> <b>"])])
    assert found.methods[1] == r"pfedmoe (train.augment = $\frac{$ --> <b>)"
    text = drawing.svg(versus.curves(found, found.settings[0], 0))
    assert text.count("<svg") == text.count("</svg>") == 1 and "<b>" not in text and "<!--" not in text


def test_a_table_that_no_browser_likes_stays_in_its_file() -> None:
    column = tables.Column("n")
    large = tables.Table("large", "Large", [column], [[tables.number(n)] for n in range(page.MOST_CELLS + 1)])
    report = sections.Report("R", "", [], [sections.Section("S", [large])], {})
    assert len(page.html(report)) < 20_000 and "in tables/large.csv" in page.html(report)
    assert tables.to_csv(large).count("\n") == page.MOST_CELLS + 2


def test_series_differ_without_colour() -> None:
    looks = [drawing.style(n, drawing.PAPER) for n in range(35)]
    assert len({(str(look.linestyle), look.marker) for look in looks}) == 35
