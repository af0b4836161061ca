"""Comparison reports: how runs are grouped, named, computed and shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.report import (
    client_section,
    compare,
    comparison_figures,
    comparison_report,
    costs,
    document,
    drawing,
    page,
    run_figures,
    run_report,
    tables,
)
from pfedmoe_mpi.report.load import Run, load_run
from support.report_runs import like


def test_varying_settings_name_the_variants(trained: Path) -> None:
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
        "also different between settings: participation (1.0; 0.1)",
        f"train.lr differs between methods: pfedmoe {run.config['train.lr']}; standalone 0.01",
    )
    assert found.baseline("") == found.baseline("standalone") == "standalone"
    with pytest.raises(compare.CompareError, match="baseline = pfedmoe matches several methods"):
        found.baseline("pfedmoe")


def test_differing_data_name_a_setting_not_a_variant(trained: Path) -> None:
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
        "pfedmoe, unless its label says otherwise: gate.hidden = 64, gate.layers = 2",
        "also different between settings: train.augment (none; flip)",
    )


def test_data_name_a_setting_before_dependent_values(trained: Path) -> None:
    run = load_run(trained)
    found = compare.compare([run, like(run, "b", data__source="heart", clients=10, rounds=8)])
    assert found.settings == ["data.source = heart", "data.source = synthetic"]
    assert found.notes == ("also different between settings: rounds (3; 8), clients (4; 10)",)


def test_model_pools_are_settings_where_a_method_has_several(trained: Path) -> None:
    run = load_run(trained)
    same = like(run, "b", model__pool=["mlp5"])
    found = compare.compare([run, same, like(same, "c", algorithm="fedavg")])
    assert set(found.settings) == {"model.pool = mlp5,mlp4", "model.pool = mlp5"}
    assert [group.method for group in found.of("model.pool = mlp5")] == ["pfedmoe", "fedavg"]


@pytest.mark.parametrize(
    ("freedom", "expected"),  # published quantiles of Student's t
    [(1, 12.70620), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227), (100, 1.98397)],
)
def test_student_quantile_equals_the_table(freedom: int, expected: float) -> None:
    assert compare.t_quantile(freedom) == pytest.approx(expected, abs=5e-6)


def test_one_time_bytes_go_to_new_members(trained: Path) -> None:
    run = load_run(trained)
    cohorts = [[0, 1], [1, 2], [0, 2]]
    history = [
        {**row, "cohort": cohort, "lost": cohort[:1], "bytes": {"up": 10.0, "down": 100.0, "once": 1000}}
        for row, cohort in zip(run.history, cohorts, strict=True)
    ]
    sent = costs.traffic(Run(run.path, run.config, history, run.events))
    assert [(t.up, t.down, t.once) for t in sent] == [(10, 200, 2000), (10, 200, 1000), (10, 200, 0)]


def test_equal_values_have_zero_spread() -> None:
    """In floating point the mean of 0.1, 0.1 and 0.1 is not 0.1."""
    assert compare.mean_std([0.1] * 3) == (0.1, 0.0)
    assert [comparison_report.plain_spread(values).text for values in ([0.1] * 3, [53.14] * 6)] == [
        "0.1",
        "53.14",
    ]


def test_numbers_are_short_and_units_fit() -> None:
    shown = [tables.short(value) for value in (0.0, 0.012345, 1.0, 999.96, 12345.6, 1e6)]
    assert shown == ["0", "0.01235", "1", "1000", "12346", "1000000"]
    assert [run_report.size(count) for count in (0, 999, 999.7, 999_600)] == ["0 B", "999 B", "1 kB", "1 MB"]


@pytest.mark.parametrize(
    ("curves", "expected"),
    [
        ([[0.05, 0.29]], [0.1, 0.15, 0.2, 0.25]),
        ([[0.54, 0.57]], [0.55, 0.56, 0.57]),
        ([[0.2, 0.6999999999999999]], [0.3, 0.4, 0.5, 0.6]),
        ([[0.6, 0.7], [0.65, 0.4]], [0.62, 0.64, 0.66, 0.68, 0.7]),
        ([[0.9, 0.91], [0.1, 0.1]], [0.2, 0.4, 0.6, 0.8]),
        ([[0.7, 0.7, 0.6]], []),
        ([[None, 0.7, 0.72]], [0.71, 0.72]),
        ([[None]], []),
    ],
)
def test_default_targets_begin_above_the_first_round(
    trained: Path, curves: list[list[float | None]], expected: list[float]
) -> None:
    run = load_run(trained)
    row = run.history[-1]
    found = []
    for means in curves:
        rows = [
            {**row, "round": number, "accuracy": {**row["accuracy"], "mean": mean}}
            for number, mean in enumerate(means, 1)
        ]
        found.append(Run(run.path, run.config, rows, run.events))
    listed = costs.separating_targets(found)
    assert listed == expected
    for share in listed:
        assert any(costs.reached(one, share) for one in found)


def test_just_started_seed_does_not_shorten_the_curve(trained: Path) -> None:
    run = load_run(trained)
    started = Run(Path("b"), {**run.config, "seed": 1}, run.history[:2], run.events)
    (group,) = compare.compare([run, started]).groups
    assert compare.curve(group)[0].tolist() == [2, 3] and len(group.curve_runs) == 1
    (alone,) = compare.compare([started]).groups
    assert compare.curve(alone)[0].tolist() == [2]


def test_untrained_clients_are_in_no_mean(trained: Path) -> None:
    """Client 3 never trains and client 2 joins in round 3, so both architectures lack one client."""
    run = load_run(trained)
    absent_clients = json.dumps({"absent": [[3], [2]]})
    events = [{**run.events[0], "samples": absent_clients}]
    run = Run(run.path, {**run.config, "join.round": 3}, run.history, events)
    assert [run.absent_clients(round) for round in (2, 3)] == [{2, 3}, {3}]
    accuracy = run_figures.column(run, "accuracy")
    assert np.isnan(accuracy).tolist() == [
        [True] * 4,
        [False, False, True, True],
        [False, False, False, True],
    ]
    (found,) = [table for table in run_report.report(run, None).tables if table.name == "architectures"]
    assert [row[1].text for row in found.rows] == ["2", "1"]
    (clients,) = [table for table in run_report.report(run, None).tables if table.name == "clients"]
    assert clients.rows[-1][0].text == "3" and "every mean over clients: 3" in clients.notes[0]
    other = Run(Path("b"), {**run.config, "algorithm": "standalone"}, run.history, run.events)
    pair = compare.compare([run, other]).groups
    assert np.isnan(compare.client_differences(*pair)).tolist() == [False, False, False, True]


def recorded(run: Run, path: str, algorithm: str = "standalone", **facts: Any) -> Run:
    """Return the same run of another method, with other facts in its start event; None removes a fact."""
    start = {name: value for name, value in {**run.events[0], **facts}.items() if value is not None}
    return Run(Path(path), {**run.config, "algorithm": algorithm}, run.history, [start])


def test_start_event_has_the_digests_of_the_checkpoint(trained: Path) -> None:
    with Checkpoint(sorted((trained / "checkpoints").glob("round-*.h5"))[-1]) as loaded:
        names = ("data_digest", "partition_digest")
        assert load_run(trained).digests == tuple(loaded.identity[name] for name in names)


@pytest.mark.parametrize(
    ("facts", "pairs", "note"),
    [
        ({}, True, ""),
        ({"data_digest": "0"}, False, "not paired, because their data or partitions differ: trained and b"),
        ({"partition_digest": "0"}, False, "not paired, because their data or partitions differ"),
        (
            {"data_digest": None},
            True,
            "paired by seed alone, because an earlier version did not record their",
        ),
        ({"data_digest": None, "class_counts": [[50, 0]] * 4}, False, "not paired, because"),
    ],
)
def test_runs_on_other_data_are_not_paired(
    trained: Path, facts: dict[str, Any], pairs: bool, note: str
) -> None:
    run = load_run(trained)
    run = Run(Path("trained"), run.config, run.history, run.events)
    other = recorded(run, "b", **facts)
    method, base = compare.compare([run, other]).groups
    assert (method.method, base.method) == ("pfedmoe", "standalone")
    assert (compare.paired(method, base) is not None) is pairs
    assert (len(compare.client_differences(method, base)) > 0) is pairs
    made = comparison_report.report([run, other], "", None)
    assert [text.startswith(note) for text in made.notes] == ([True] if note else [])
    shown = any(table.name == "differences" for table in made.tables)
    assert shown is pairs and (pairs or "its data in common with standalone" in str(made.sections))


def test_seeds_with_the_same_data_are_paired(trained: Path) -> None:
    """Of three seeds the second has other data, as if the file had been replaced in between."""
    run = load_run(trained)
    runs = []
    for seed in range(3):
        for method in ("pfedmoe", "standalone"):
            digest = f"{method if seed == 1 else 'same'} {seed}"
            one = recorded(run, f"{method}-{seed}", method, data_digest=digest)
            runs.append(Run(one.path, {**one.config, "seed": seed}, one.history, one.events))
    comparison = compare.compare(runs)
    pair = compare.paired(*comparison.groups)
    assert pair is not None and pair.seeds == (0, 2)
    (note,) = compare.pairing_notes(comparison, "standalone")
    assert note.endswith("differ: pfedmoe-1 and standalone-1")


def test_accuracy_of_the_round_chosen_on_validation_rows_is_shown(trained: Path) -> None:
    """Test accuracy is highest in another round than validation accuracy."""
    run = load_run(trained)
    assert run.chosen is None and not run_report.report(run, None).notes
    rows = [
        {**row, "accuracy": {**row["accuracy"], "mean": test}, "accuracy_validation": {"mean": validation}}
        for row, test, validation in zip(
            run.history, (0.25, 0.9, 0.75), (0.5, 0.5, None), strict=True
        )  # round 1 is the first of the best
    ]
    held = Run(run.path, run.config, rows, run.events)
    assert held.chosen is rows[0]
    single = run_report.report(held, None)
    assert ("accuracy, round 1, chosen on validation rows", "25.00 %") in single.facts
    assert ("accuracy, round 3", "75.00 %") in single.facts
    several = comparison_report.report([held, recorded(run, "b")], "", None)
    for report in (single, several):
        assert [note for note in report.notes if "validation rows choose best.h5" in note]
    (table,) = [table for table in several.tables if table.name == "accuracies"]
    assert table.columns[-1].title == "round chosen on validation"
    assert [row[-1].text for row in table.rows] == ["25.00", "–"]


def test_selected_round_is_the_one_compared(trained: Path, assert_refused: Callable[..., str]) -> None:
    """Two methods whose order depends on the round that is reported; both ended by `run.patience`."""
    run = load_run(trained)
    means = {"a": ((0.5, 0.8), (0.9, 0.4), (0.6, 0.1)), "b": ((0.7, 0.8), (0.8, 0.4), (0.5, 0.1))}
    ended = {**run.config, "rounds": 9, "run.patience": 2}
    found = {
        "validation": ("50.00", "70.00", 2),
        "test": ("90.00", "80.00", 1),
        "last": ("60.00", "50.00", 1),
    }
    for select, (a, b, better) in found.items():
        runs = []
        for method, pairs in means.items():
            rows = [
                {**row, "accuracy": {**row["accuracy"], "mean": test}, "accuracy_validation": {"mean": held}}
                for row, (test, held) in zip(run.history, pairs, strict=True)
            ]
            settings = {**ended, "algorithm": method}
            runs.append(Run(Path(method), settings, rows, run.events, select))
        assert all(run.finished and run.ended_early for run in runs)
        report = comparison_report.report(runs, "a", None)
        shown = {table.name: table for table in report.tables}
        assert [row[1].text for row in shown["results"].rows] == [a, b]
        assert [row[1].mark for row in shown["results"].rows][better - 1] == "best"
        in_words = compare.WHEN[select]
        assert in_words in shown["results"].notes[0] and [note for note in report.notes if in_words in note]
        last = {"last": "round chosen on validation"}.get(select, "last round")
        assert shown["accuracies"].columns[-1].title == last
        assert shown["runs"].rows[0][-1].values == ({"validation": 1, "test": 2, "last": 3}[select],)
        (pair,) = [compare.paired(*reversed(compare.compare(runs).groups))]
        assert pair is not None and pair.mean == pytest.approx((float(b) - float(a)) / 100)
    assert_refused(
        "--select = validation, but .* has no accuracy on validation rows(.|\n)*--select last",
        "report",
        trained,
        "--select",
        "validation",
        "--text",
    )


def test_named_clients_are_shown_over_seeds(trained: Path) -> None:
    """Five seeds, in which the second client's accuracy is 0, 10, … 40 %, and the others' 50 %."""
    run, names = load_run(trained), ["Aarau", "Bern", "Chur", "Davos"]
    runs = []
    for seed in range(5):
        columns = {name: run.last["clients"][name] for name in ("alpha", "loss", "samples")}
        columns |= {"accuracy": [0.5, seed / 10, 0.5, 0.5], "auc": [None] * 4}
        one = recorded(run, str(seed), client_names=names)
        settings = {**one.config, "partition.kind": "natural", "seed": seed}
        runs.append(Run(one.path, settings, [{**run.last, "clients": columns}], one.events))
    (table,) = client_section.sections(compare.compare(runs))[0].tables
    assert [row[0].text for row in table.rows] == names
    half = 2.7764451052 * np.std([0, 0.1, 0.2, 0.3, 0.4], ddof=1) / 5**0.5
    assert table.rows[1][4].text == "20.00"
    assert table.rows[1][5].values == pytest.approx((0.2 - half, 0.2 + half))
    assert table.rows[0][5].text == "50.0 to 50.0" and table.rows[0][6].text == "–"
    unnamed = [Run(each.path, run.config, each.history, each.events) for each in runs[:1]]
    assert client_section.sections(compare.compare(unnamed)) == []


def test_values_that_some_seeds_lack_say_how_many_have_them(trained: Path) -> None:
    """Such as macro-F1, which runs of an earlier version did not measure."""
    run = load_run(trained)
    older = [{name: value for name, value in row.items() if name != "macro_f1"} for row in run.history]
    old = Run(Path("c"), {**run.config, "seed": 2}, older, run.events)
    found = compare.compare([run, like(run, "b", seed=1), old])
    (table,) = comparison_report.fairness(found)
    row = dict(zip((column.title for column in table.columns), table.rows[0], strict=True))
    assert row["seeds"].text == "3" and row["macro-F1"].text.endswith(" ± 0.00 (2)")
    assert row["balanced accuracy"].text.endswith(" ± 0.00") and "in brackets: the seeds" in table.notes[-1]
    assert "brackets" not in comparison_report.accuracies(found).notes[-1]


def test_equal_looking_values_are_marked_alike(trained: Path) -> None:
    run = load_run(trained)
    found = []
    for number, value in enumerate((0.70001, 0.70002, 0.6)):
        row = {**run.history[-1], "accuracy": {**run.history[-1]["accuracy"], "mean": value}}
        found.append(Run(Path(str(number)), {**run.config, "algorithm": f"m{number}"}, [row], run.events))
    shown = comparison_report.results(compare.compare(found)).rows
    assert [row[1].mark for row in shown] == ["best", "best", "second"]


def test_equal_values_rank_alike() -> None:
    assert tables.ranks([0.5, None, 0.7, 0.7, 0.2]) == ["second", "", "best", "best", ""]
    assert tables.ranks([0.5, None]) == ["", ""]


def test_latex_escapes_any_name() -> None:
    columns = [tables.Column("50 % & more", words=True), tables.Column("x_1")]
    made = tables.Table(
        "t", "T", columns, [[tables.word(r"a\b {c}^~#$"), tables.Cell("−1 ± 2", (1,), "best")]]
    )
    lines = tables.to_latex(made).splitlines()
    assert lines[2:4] == [r"\begin{tabular}{lr}", r"\toprule"] and lines[-1] == r"\end{tabular}"
    assert lines[4] == r"50 \% \& more & x\_1 \\"
    escaped = r"a\textbackslash{}b \{c\}\textasciicircum{}\textasciitilde{}\#\$"
    assert lines[6] == escaped + r" & \textbf{$-$1 $\pm$ 2} \\"


def test_legend_is_not_read_as_a_formula(trained: Path) -> None:
    run = load_run(trained)
    found = compare.compare([run, like(run, "b", train__augment=[r"$\frac{$ --> <b>"])])
    assert found.methods[1] == r"pfedmoe (train.augment = $\frac{$ --> <b>)"
    text = drawing.svg(comparison_figures.curves(found, found.settings[0], 0))
    assert text.count("<svg") == text.count("</svg>") == 1 and "<b>" not in text and "<!--" not in text


def test_huge_table_stays_in_its_file() -> None:
    column = tables.Column("n")
    large = tables.Table("large", "Large", [column], [[tables.number(n)] for n in range(page.MOST_CELLS + 1)])
    report = document.Report("R", "", [], [document.Section("S", [large])], {})
    assert len(page.html(report)) < 20_000 and "in tables/large.csv" in page.html(report)
    assert tables.to_csv(large).count("\n") == page.MOST_CELLS + 2


def test_series_differ_without_colour() -> None:
    looks = [drawing.style(n, drawing.PAPER) for n in range(35)]
    assert len({(str(look.linestyle), look.marker) for look in looks}) == 35
