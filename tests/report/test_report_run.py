"""The report on one run: what its tables list, and how its figures name clients and rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest

from pfedmoe_mpi.report import drawing, page, run_figures, run_report
from pfedmoe_mpi.report.load import Run, load_run
from support.report_runs import like


def test_fact_in_mebibytes_says_memory(trained: Path) -> None:
    names = [name for name, value in run_report.report(load_run(trained), None).facts if "MiB" in value]
    assert names == ["memory of the largest rank"]


@pytest.mark.parametrize(
    ("changes", "listed"),
    [
        ({"model__pool": ["mlp1", "mlp2", "mlp3", "mlp4", "mlp5"]}, set()),  # what auto gives for 8×8 images
        ({}, {"model.pool"}),
        ({"model__pool": ["mlp5"]}, {"model.pool"}),
        ({"gate__start": "paper"}, {"model.pool", "gate.start"}),
        (  # needs equal models, and gates that it does not have start as the paper's
            {"model__pool": ["mlp5"], "algorithm": "fedavg", "gate__start": "paper"},
            {"algorithm"},
        ),
        ({"model__shared": "mlp4"}, {"model.pool", "model.shared"}),
        ({"model__dim": 64}, {"model.pool", "model.dim"}),
        (
            {"model__pool": ["no longer there"], "gate__module": "mine.py:Gate", "gate__start": "paper"},
            {"model.pool", "model.shared", "model.dim"},
        ),
    ],
)
def test_what_auto_stands_for_is_not_listed(trained: Path, changes: dict[str, Any], listed: set[str]) -> None:
    run = like(load_run(trained), "b", **changes)
    (found,) = [table for table in run_report.report(run, None).tables if table.name == "changed"]
    names = {row[0].text for row in found.rows}
    shown = {name for name in names if name.startswith("model.") or name in {"algorithm", "gate.start"}}
    assert shown == listed
    bare = Run(run.path, run.config, run.history, [{**run.events[0], "samples": None}])
    (found,) = [table for table in run_report.report(bare, None).tables if table.name == "changed"]
    assert "model.shared" in {row[0].text for row in found.rows}, "an earlier version recorded no shape"


def test_clients_are_called_by_the_names_of_the_data(trained: Path) -> None:
    hospitals = ["cleveland", "hungarian", "switzerland", "a hospital with a long name"]
    run = load_run(trained)
    start = {**run.events[0], "client_names": hospitals}
    drawn = Run(run.path, run.config, run.history, [start])
    assert drawn.client_names == (), "rows divided anew are not those of a hospital"
    named = Run(run.path, {**run.config, "partition.kind": "natural"}, run.history, [start])
    report = run_report.report(named, None)
    assert named.client_names == tuple(hospitals)
    for name in ("clients", "partition"):
        (table,) = [table for table in report.tables if table.name == name]
        assert {row[1].text for row in table.rows} == set(hospitals)
    for name in ("clients", "partition", "gates"):
        (figure,) = [figure for figure in report.figures if figure.name == name]
        for canvas in (matplotlib.figure.Figure(figsize=size) for size in (figure.size, figure.narrow.size)):
            figure.draw(canvas, drawing.PAPER)
            axes = canvas.axes[1 if name == "gates" else 0]
            axis = axes.yaxis if name == "gates" else axes.xaxis
            shown = {label.get_text() for label in axis.get_ticklabels()}
            assert shown == {*hospitals[:3], "a hospital wi…"}, name


def test_sorted_clients_are_numbered_where_there_is_room(trained: Path) -> None:
    run = load_run(trained)
    canvas = matplotlib.figure.Figure(figsize=(drawing.WIDTH, 3))
    run_figures.clients(run).draw(canvas, drawing.PAPER)
    accuracy = np.array(run.last["clients"]["accuracy"])
    shown = [int(label.get_text()) for label in canvas.axes[0].get_xticklabels()]
    assert sorted(shown) == [0, 1, 2, 3] and (np.diff(accuracy[shown]) >= 0).all()
    axes = matplotlib.figure.Figure(figsize=(drawing.NARROW, 3)).subplots()
    assert not run_figures.client_ticks(axes.figure, axes.xaxis, [str(k) for k in range(60)])


def test_stacked_panels_share_their_ticks(trained: Path) -> None:
    run = load_run(trained)
    figures = {figure.name: figure for figure in run_report.report(run, None).figures}
    for name in ("gates", "convergence", "burden"):
        figure = figures[name] if name == "gates" else figures[name].narrow
        canvas = matplotlib.figure.Figure(figsize=figure.size)
        figure.draw(canvas, drawing.PAPER)
        above, below = canvas.axes[:2]
        assert above.get_xlim() == below.get_xlim() and list(above.get_xticks()) == list(below.get_xticks())
        assert above.get_xlabel() == "" and below.get_xlabel() == "round"
    canvas = matplotlib.figure.Figure(figsize=figures["ranks"].size)
    figures["ranks"].draw(canvas, drawing.PAPER)
    bars, heat = canvas.axes[:2]
    assert bars.get_ylim() == heat.get_ylim() and list(bars.get_yticks()) == list(heat.get_yticks())


def test_columns_of_a_heat_map_are_whole_rounds() -> None:
    for rounds, expected in (
        (list(range(1, 41)), [5, 10, 15, 20, 25, 30, 35, 40]),
        ([10, 20, 30, 35], [10, 20, 30, 35]),
        ([1, 3, 5, 7], [1, 3, 5, 7]),
        ([7], [7]),
        ([*range(1, 200, 2), 200], [1, 200]),
    ):
        axes = matplotlib.figure.Figure().subplots()
        run_figures.round_columns(axes, rounds)
        labels = [int(label.get_text()) for label in axes.get_xticklabels()]
        assert labels == expected == [rounds[int(at)] for at in axes.get_xticks()]


def test_restart_event_lists_changed_settings(trained: Path) -> None:
    run = load_run(trained)
    start = run.events[0]
    again = Run(
        run.path, run.config, run.history, [start, {**start, "event": "restart", "ranks": 4, "torch": "9"}]
    )
    (found,) = [table for table in run_report.report(again, None).tables if table.name == "events"]
    assert [row[3].text for row in found.rows] == ["", "ranks: 4; torch: 9"]


def test_axes_of_counts_have_whole_numbers(trained: Path) -> None:
    axes = matplotlib.figure.Figure().subplots()
    axes.plot([1], [1])
    run_figures.whole_numbers(axes.xaxis)
    assert [tick for tick in axes.get_xticks() if 0.9 < tick < 1.1] == [1]


def test_evaluation_time_is_shown_where_measured(trained: Path) -> None:
    canvas = matplotlib.figure.Figure()
    run_figures.seconds(load_run(trained)).draw(canvas, drawing.PAPER)
    (line,) = [line for line in canvas.axes[0].lines if line.get_label() == "evaluate"]
    assert list(line.get_xdata()) == [2, 3], "measured every second round, and in the last"


def test_figures_of_many_clients_are_distributions(trained: Path) -> None:
    one, times = load_run(trained), 75
    history = [
        {**row, "clients": {name: values * times for name, values in row["clients"].items()}}
        for row in one.history
    ]
    counts = np.tile([[3, 0], [5, 1], [5, 2], [40, 9]], (times, 1))
    events = [{**one.events[0], "class_counts": counts.tolist()}]
    report = run_report.report(Run(one.path, one.config, history, events), None)
    drawn = {}
    for figure in report.figures:
        drawn[figure.name] = matplotlib.figure.Figure(figsize=figure.size)
        figure.draw(drawn[figure.name], drawing.PAPER)
    samples, classes = drawn["partition"].axes
    assert sum(bar.get_height() for bar in samples.patches) == 300
    assert [bar.get_height() for bar in classes.patches] == [0, 75, 225]
    lines = [line.get_ydata() for line in drawn["clients"].axes[0].lines]
    assert [len(line) for line in lines] == [150, 150] and all((np.diff(line) >= 0).all() for line in lines)
    (image,) = drawn["gates"].axes[1].images
    assert np.allclose(image.get_array().sum(axis=0), 100), "every measured round has all clients"
    (table,) = [table for table in report.tables if table.name == "clients"]
    assert len(table.rows) == 300 and table.searched == 2
    shown = page.html(report)
    assert shown.count("<script") == 3 and "the first 40 of 300 rows" in shown, "two tables and the search"
