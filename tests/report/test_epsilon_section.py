"""Accuracy against ε: lines, units, differences from the runs without noise, and the figure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from matplotlib.figure import Figure as Canvas

from pfedmoe_mpi.api import train
from pfedmoe_mpi.report import compare, comparison_report, drawing, epsilon_section, tables
from pfedmoe_mpi.report.load import Run

SMALL: dict[str, Any] = {
    "data": {"source": "synthetic", "samples": 200, "size": 8},
    "model": {"pool": ["mlp5"], "shared": "mlp5", "dim": 8},
    "clients": 4,
    "rounds": 1,
    "train": {"device": "cpu", "threads": 1},
}
NOISE = {"clip": 1.0, "noise": 2.0, "delta": 1e-3}
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("fedavg", {}),
    "client": ("fedavg", NOISE),
    "clipped": ("fedavg", {"clip": 1.0}),
    "sample": ("fedavg", {"unit": "sample", **NOISE}),
    "weaker": ("ditto", {"unit": "sample", **NOISE, "noise": 1.0}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of each of MADE with another accuracy."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for number, (name, (algorithm, privacy)) in enumerate(MADE.items()):
        run = train(**SMALL, algorithm=algorithm, privacy=privacy, run={"dir": folder / name})
        made[name] = with_accuracy(run, 0.9 - number / 10)
    return made


def with_accuracy(run: Run, mean: float, **config: Any) -> Run:
    last = {**run.last, "accuracy": {**run.last["accuracy"], "mean": mean}}
    return replace(run, config={**run.config, **config}, history=[last])


def drawn(section: Any, number: int) -> Any:
    """Return the axes of a section's figure."""
    figure = section.figures[number]
    canvas = Canvas(figsize=figure.size, layout="constrained")
    figure.draw(canvas, drawing.PAPER)
    return canvas.axes[0]


def test_runs_are_tabled_by_epsilon_beside_those_without(runs: dict[str, Run]) -> None:
    report = comparison_report.report(list(runs.values()), "", None)
    (section,) = [section for section in report.sections if section.title == "Privacy"]
    (table,) = section.tables
    epsilon = {name: run.last["privacy"] for name, run in runs.items() if name != "plain"}
    sent = {name: entry["epsilon"] for name, entry in epsilon.items()}
    found = [(row[0].text, row[2].text, row[3].values[0], row[8].text) for row in table.rows]
    assert found == [
        ("fedavg", "client", sent["client"], "−10.00"),
        ("fedavg", "client", "infinite", "−20.00"),
        ("fedavg", "sample", sent["sample"], "−30.00"),
        ("fedavg", "none", "none", "–"),
        ("ditto", "sample", sent["weaker"], "–"),
    ]
    private = [epsilon[name]["epsilon_private"] for name in ("sample", "weaker")]
    assert [row[4].values[0] for row in table.rows] == [None, None, private[0], None, private[1]]
    assert private[1] > sent["weaker"], "the personal models of Ditto have a norm of their own"
    assert "at δ = 0.001, " in table.notes[0] and r"$\varepsilon$" in tables.to_latex(table)
    assert not epsilon_section.sections(compare.compare([runs["plain"]]))


def test_figures_have_a_line_for_each_method_and_end_with_none(runs: dict[str, Run]) -> None:
    (section,) = epsilon_section.sections(compare.compare(list(runs.values())))
    assert [figure.name for figure in section.figures] == ["epsilon_client", "epsilon_sample"]
    (client,) = [line for line in drawn(section, 0).get_lines() if not line.get_label().startswith("_")]
    assert client.get_label() == "fedavg" and len(client.get_xdata()) == 2, "Ditto protects samples alone"
    axes = drawn(section, 1)
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    assert [line.get_label() for line in lines] == ["fedavg", "ditto"] and axes.get_xscale() == "log"
    assert lines[0].get_ydata().tolist() == pytest.approx([60, 90]), "sample's ε, then none"
    weakest = runs["weaker"].last["privacy"]["epsilon"]
    assert lines[1].get_xdata() == pytest.approx([weakest], rel=0.05)
    assert lines[0].get_xdata()[1] == pytest.approx(2 * weakest, rel=0.05)
    assert axes.get_xticklabels()[-1].get_text() == "none"


def test_interval_over_seeds_is_drawn_and_tabled(runs: dict[str, Run]) -> None:
    """Five seeds, with accuracies from 50 % to 70 %, of which the run without noise has ten points more."""
    seeds = [
        with_accuracy(runs[name], 0.5 + seed / 20 + gain, seed=seed)
        for name, gain in (("client", 0.0), ("plain", 0.1))
        for seed in range(5)
    ]
    (section,) = epsilon_section.sections(compare.compare(seeds))
    noisy = section.tables[0].rows[0]
    assert [cell.text for cell in noisy[6:9]] == ["5", "60.00 ± 7.91", "−10.00"]
    assert noisy[9].values == pytest.approx((-0.1, -0.1))
    low, high = compare.interval([0.5, 0.55, 0.6, 0.65, 0.7])
    (bar, _) = drawn(section, 0).collections
    assert low and high and bar.get_segments()[0][:, 1].tolist() == pytest.approx([100 * low, 100 * high])
    few = [run for run in seeds if run.seed < 4]
    (section,) = epsilon_section.sections(compare.compare(few))
    assert section.tables[0].rows[0][9].text == "–" and not drawn(section, 0).collections
