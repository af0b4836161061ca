"""Runs of the papers' tables beside the figures that the papers print."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from pfedmoe_mpi import config
from pfedmoe_mpi.report import compare, paper_section
from pfedmoe_mpi.report.load import Run, load_run
from pfedmoe_mpi.reproduce import grid
from support import launcher, report_runs
from support.launcher import SMALL_RUN
from support.paths import JOBS

# (algorithm, cell, seeds, what `reproduce` writes into [run] besides)
RUNS = (
    ("standalone", "cifar10-n10/standalone", (0, 1), ""),
    (
        "pfedmoe",
        "cifar10-n10/pfedmoe",
        (0,),
        'scale = 0.1\naltered = ["train.epochs", "data.size"]',
    ),
    ("pfedmoe", "cifar10-n50/pfedmoe", (0,), ""),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, session: launcher.Session) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    for algorithm, cell, seeds, further in RUNS:
        for seed in seeds:
            name = f"runs/{cell.replace('/', '-')}-{seed}"
            text = f'[run]\ntable = "pfedmoe-homogeneous"\ncell = "{cell}"\n{further}\n'
            (folder / "place.toml").write_text(text)
            clients = ("--clients", "5") if "n50" in cell else ()
            which = ("--algorithm", algorithm, "--seed", str(seed), "--run.dir", name)
            result = session("place.toml", *SMALL_RUN, *which, *clients, cwd=folder)
            assert result.code == 0, result.err
    result = session("report", "runs", "--out", "page", cwd=folder)
    assert result.code == 0, result.err
    return folder / "page"


def test_results_are_listed_beside_the_papers(report: Path) -> None:
    rows = {
        (row["setting"], row["method"]): row
        for row in report_runs.read_table(report, "paper_pfedmoe-homogeneous")
    }
    assert len(rows) == 3
    row = rows["cifar10-n10", "standalone"]
    runs = report.parent / "runs"
    last = [launcher.read_metrics(runs / f"cifar10-n10-standalone-{seed}")[-1] for seed in (0, 1)]
    own, before = ([each[name]["mean"] for each in last] for name in ("accuracy", "accuracy_cohort"))
    assert report_runs.same_number(row["ours mean"], sum(own) / 2) and row["ours seeds"] == "2"
    assert report_runs.same_number(row["cohort before the sum mean"], sum(before) / 2)
    assert row["cohort before the sum seeds"] == "2"
    assert report_runs.same_number(row["paper"], 0.9635), "Standalone, N = 10, CIFAR-10"
    assert report_runs.same_number(row["difference"], sum(own) / 2 - 0.9635)
    assert row["as run"] == "as the table"
    reduced = rows["cifar10-n10", "pfedmoe"]
    assert report_runs.same_number(reduced["paper"], 0.968)
    assert reduced["as run"] == "reduced scale: 1 of 10 rounds; changed: train.epochs = 1, data.size = 8"
    unknown = rows["cifar10-n50", "pfedmoe"]
    assert unknown["ours mean"] and not unknown["paper"] and not unknown["difference"]


def test_page_latex_and_terminal_show_paper_figures(report: Path, session: launcher.Session) -> None:
    shown = report_runs.page_table(report, "paper_pfedmoe-homogeneous")
    cells = {(row[0][0], row[1][0]): [text for text, _ in row] for row in shown}
    assert cells["cifar10-n10", "standalone"][4] == "96.35"
    assert cells["cifar10-n10", "pfedmoe"][4] == "96.80*", "no table prints it"
    assert cells["cifar10-n50", "pfedmoe"][4:6] == ["–", "–"]
    assert "96.35" in (report / "tables" / "paper_pfedmoe-homogeneous.tex").read_text()
    said = session("report", "runs", "--text", "true", cwd=report.parent).out
    assert "mean over all clients after the sum" in said and "cohort before the sum: the round's" in said
    assert "solved from ranges" in said and "reduced scale: 1 of 10 rounds" in said
    alone = session("report", "runs/cifar10-n10-standalone-0", "--text", "true", cwd=report.parent).out
    assert "96.35" in alone and "96.80" not in alone


def test_differently_altered_runs_are_not_replicates(trained: Path) -> None:
    run = load_run(trained)
    place = {"run.table": "t", "run.cell": "c/pfedmoe", "run.altered": ["train.epochs"]}
    made = [
        Run(Path(str(epochs)), {**run.config, **place, "train.epochs": epochs}, run.history, ())
        for epochs in (1, 5)
    ]
    (section,) = paper_section.sections(made)
    (found,) = section.tables
    assert section.title == "Results by table", "no paper prints it"
    assert [column.title for column in found.columns] == [
        *("setting", "method", "ours", "cohort before the sum", "as run")
    ]
    assert [row[-1].text for row in found.rows] == [f"changed: train.epochs = {n}" for n in (1, 5)]
    assert [row[2].values[2] for row in found.rows] == [1, 1]


def test_other_runs_have_no_paper_section(trained: Path, session: launcher.Session) -> None:
    said = session("report", str(trained), "--text", "true", cwd=trained.parent).out
    assert "paper" not in said


def test_paper_table_is_one_table(trained: Path) -> None:
    """Ten methods in nine settings, though data sets are augmented otherwise."""
    run = load_run(trained)
    cells = grid.expand(grid.read(JOBS / "tables" / "pfedmoe-heterogeneous.toml"), {})
    found = compare.compare(
        [Run(Path(c.name), config.flatten(config.to_tree(c.config)), run.history, ()) for c in cells]
    )
    assert (len(found.methods), len(found.settings), len(found.groups)) == (10, 9, 90)
    assert found.baseline("") == "standalone" and "clients = 10, data.name = MNIST" in found.settings


def test_every_paper_figure_belongs_to_a_table_cell() -> None:
    figures = tomllib.loads(paper_section.PUBLISHED.read_text())
    number = 0
    for name, held in figures.items():
        runs = grid.expand(grid.read(JOBS / "tables" / f"{name}.toml"), {})
        cells = {run.config.run.cell for run in runs}
        known = {f"{column}/{row}" for column, rows in held["cells"].items() for row in rows}
        assert known <= cells and set(held.get("solved", ())) <= known
        assert all(0 < value <= 100 for rows in held["cells"].values() for value in rows.values())
        number += len(known)
    # nine baselines in nine settings, twice, less what did not converge; pFedMoE, FedJETs, 500 rounds
    assert number == 2 * 81 - 7 - 19 + 3 + 12 + 7


def test_five_hundred_rounds_are_compared_with_the_main_table() -> None:
    figures = tomllib.loads(paper_section.PUBLISHED.read_text())
    main = figures["pfedmoe-heterogeneous"]["cells"]
    for size, rows in figures["five-hundred-rounds"]["cells"].items():
        assert rows == {row: main[f"cifar10-{size}"][{"paper": "pfedmoe"}.get(row, row)] for row in rows}
