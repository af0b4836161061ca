"""Every table of a report, computed again from the raw rows with numpy alone."""

from __future__ import annotations

import html
import json
from pathlib import Path

import numpy as np
import pytest

from support.launcher import Session, read_metrics
from support.report_runs import (
    RUNS,
    class_counts,
    make_runs,
    metrics_by_seed,
    operations,
    page_table,
    reached,
    read_table,
    same_number,
    traffic,
)

T_4 = 2.7764451051977987  # Student's t: 95 % of 4 degrees of freedom lie within, Fisher and Yates
GROUPS = [(method, alpha) for method, alpha, _ in RUNS]


@pytest.fixture(scope="module")
def runs(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of several methods, settings and seeds; read only."""
    return make_runs(session, tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def target(runs: Path) -> float:
    """An accuracy that some seeds of one group reach, and others do not."""
    tops = [
        max(row["accuracy"]["mean"] for row in history)
        for history in metrics_by_seed(runs, "pfedmoe", 1.0).values()
    ]
    return round((min(tops) + max(tops)) / 2, 4)


@pytest.fixture(scope="module")
def several(session: Session, runs: Path, target: float) -> Path:
    """The report on all of them."""
    result = session("report", "runs", "--target", str(target), cwd=runs.parent)
    assert result.code == 0, result.err
    assert "wrote report/report.html" in result.out
    return runs.parent / "report"


@pytest.fixture(scope="module")
def single(session: Session, runs: Path) -> Path:
    """The report on one."""
    result = session("report", "runs/pfedmoe-1.0-0", "--out", "one", cwd=runs.parent)
    assert result.code == 0, result.err
    return runs.parent / "one"


def setting(alpha: float) -> str:
    return f"partition.alpha = {alpha}"


def by_group(found: list[dict[str, str]]) -> dict[tuple[str, str], dict[str, str]]:
    return {(row["method"], row["setting"]): row for row in found}


def moments(values: list[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1))


# Several runs


def test_results_table_equals_the_metrics(runs: Path, several: Path) -> None:
    found = {row["method"]: row for row in read_table(several, "results")}
    page = {row[0][0]: row[1:] for row in page_table(several, "results")}
    assert list(found) == list(page) == ["fedavg", "pfedmoe", "standalone"]
    for place, alpha in enumerate((0.3, 1.0)):
        finals = {
            method: [
                history[-1]["accuracy"]["mean"] for history in metrics_by_seed(runs, method, alpha).values()
            ]
            for method in found
        }
        means = {method: np.mean(values) for method, values in finals.items() if values}
        best, second = sorted(means.values())[::-1][:2]
        for method, values in finals.items():
            text, kind = page[method][place]
            row = found[method]
            if not values:
                assert text == "–" and row[f"{setting(alpha)} mean"] == "", "not run in this setting"
                continue
            mean, std = moments(values)
            assert text == f"{100 * mean:.2f} ± {100 * std:.2f}"
            assert same_number(row[f"{setting(alpha)} mean"], mean) and same_number(
                row[f"{setting(alpha)} std"], std
            )
            assert row[f"{setting(alpha)} seeds"] == str(len(values))
            assert ("best" in kind) == (mean == best) and ("second" in kind) == (mean == second)
    latex = (several / "tables" / "results.tex").read_text()
    assert latex.count(r"\textbf{") == 2 and latex.count(r"\underline{") == 2


def test_accuracy_table_equals_the_metrics(runs: Path, several: Path) -> None:
    found = by_group(read_table(several, "accuracies"))
    assert set(found) == {(method, setting(alpha)) for method, alpha in GROUPS}
    for method, alpha in GROUPS:
        row = found[method, setting(alpha)]
        histories = metrics_by_seed(runs, method, alpha).values()
        columns = [np.array(h[-1]["clients"]["accuracy"]) for h in histories]
        before, _ = moments([h[-1]["accuracy_cohort"]["mean"] for h in histories])
        assert same_number(row["cohort before the sum mean"], before)
        for name, value in {
            "mean": np.mean,
            "worst": np.min,
            "std": np.std,
        }.items():
            mean, std = moments([float(value(column)) for column in columns])  # type: ignore[operator]
            assert same_number(row[f"{name} mean"], mean) and same_number(row[f"{name} std"], std), (
                method,
                name,
            )
        weighted = [h[-1]["accuracy"]["weighted"] for h in metrics_by_seed(runs, method, alpha).values()]
        assert same_number(row["weighted mean"], float(np.mean(weighted)))


def test_difference_table_equals_the_metrics(runs: Path, several: Path) -> None:
    found = by_group(read_table(several, "differences"))
    assert set(found) == {key for key in ((m, setting(a)) for m, a in GROUPS) if key[0] != "standalone"}
    for (method, words), row in found.items():
        alpha = float(words.rpartition(" ")[2])
        own, other = metrics_by_seed(runs, method, alpha), metrics_by_seed(runs, "standalone", alpha)
        seeds = sorted(set(own) & set(other))
        values = [own[s][-1]["accuracy"]["mean"] - other[s][-1]["accuracy"]["mean"] for s in seeds]
        mean, std = moments(values)
        assert row["seeds"] == str(len(values)) and same_number(row["difference"], mean)
        if len(values) < 5:
            assert (row["95 % interval low"], row["verdict"]) == ("", "too few to tell")
            continue
        half = T_4 * std / np.sqrt(len(values))
        assert np.allclose(
            [float(row[f"95 % interval {end}"]) for end in ("low", "high")], [mean - half, mean + half]
        )
        expected = "better" if mean > half else "worse" if mean < -half else "no difference shown"
        assert row["verdict"] == expected
    assert sum(row["verdict"] != "too few to tell" for row in found.values()) == 1


def test_client_difference_table_equals_the_metrics(runs: Path, several: Path) -> None:
    found = by_group(read_table(several, "client_differences"))
    assert len(found) == 3
    for (method, words), row in found.items():
        alpha = float(words.rpartition(" ")[2])
        own, other = metrics_by_seed(runs, method, alpha), metrics_by_seed(runs, "standalone", alpha)
        pairs = [
            [np.array(side[seed][-1]["clients"]["accuracy"]) for side in (own, other)]
            for seed in set(own) & set(other)
        ]
        values = np.mean([a - b for a, b in pairs], axis=0)
        assert row["clients"] == str(len(values)) == "4"
        counts = [int(row[name]) for name in ("better", "equal", "worse")]
        assert counts == [(values > 0).sum(), (values == 0).sum(), (values < 0).sum()]
        assert same_number(row["share better"], counts[0] / len(values))
        for name, share in (("10th percentile", 10), ("median", 50), ("90th percentile", 90)):
            assert same_number(row[name], float(np.percentile(values, share)))


def test_figures_are_drawn_by_setting(several: Path) -> None:
    kinds = ("curves", "intervals", "client_differences")
    stems = {path.stem for path in (several / "figures").iterdir()}
    assert stems == {f"{kind}_{number}" for kind in kinds for number in (1, 2)}


def test_target_table_equals_the_metrics(runs: Path, several: Path, target: float) -> None:
    found = by_group(read_table(several, "target"))
    some, all_of_them = 0, 0
    for method, alpha in GROUPS:
        row = found[method, setting(alpha)]
        histories = metrics_by_seed(runs, method, alpha)
        at = {seed: reached(history, target) for seed, history in histories.items()}
        there = [seed for seed, index in at.items() if index is not None]
        assert row["reached by"] == str(len(there)) and same_number(row["target"], target)
        some += 0 < len(there) < len(at)
        if len(there) < len(at):
            assert row["round mean"] == row["MB sent mean"] == row["GFLOP mean"] == ""
            continue
        all_of_them += 1
        index = [i for i in at.values() if i is not None]
        spent = [
            traffic(history)[: i + 1].sum() / 1e6
            for history, i in zip(histories.values(), index, strict=True)
        ]
        folders = [runs / f"{method}-{alpha}-{seed}" for seed in at]
        work = [operations(run)[: i + 1].sum() / 1e9 for run, i in zip(folders, index, strict=True)]
        for name, values in (("round", [i + 1.0 for i in index]), ("MB sent", spent), ("GFLOP", work)):
            mean, std = moments(values)
            assert same_number(row[f"{name} mean"], mean) and same_number(row[f"{name} std"], std), (
                method,
                name,
            )
    assert all_of_them and some, "the target separates runs"


def test_default_targets_separate_the_runs(session: Session, runs: Path) -> None:
    result = session("report", "runs", "--out", "untold", cwd=runs.parent)
    assert result.code == 0
    found = read_table(runs.parent / "untold", "target")
    for alpha in (0.3, 1.0):
        rows = [row for row in found if row["setting"] == setting(alpha)]
        methods = [method for method, other in GROUPS if other == alpha]
        means = [
            [line["accuracy"]["mean"] for line in history]
            for method in methods
            for history in metrics_by_seed(runs, method, alpha).values()
        ]
        listed = sorted({float(row["target"]) for row in rows})
        assert len(listed) > 1 and len(rows) == len(listed) * len(methods), "methods beside each other"
        for share in listed:
            assert any(values[0] < share for values in means), "not reached at once by all"
            assert any(max(values) >= share for values in means), "reached by some"


def test_round_cost_table_equals_the_metrics(runs: Path, several: Path) -> None:
    found = by_group(read_table(several, "cost"))
    for method, alpha in GROUPS:
        row = found[method, setting(alpha)]
        histories = metrics_by_seed(runs, method, alpha)
        folders = [runs / f"{method}-{alpha}-{seed}" for seed in histories]
        expected = {
            "seconds per round": [
                float(np.mean([r["seconds"]["total"] for r in h])) for h in histories.values()
            ],
            "MB per round": [float(traffic(h).sum(axis=1).mean() / 1e6) for h in histories.values()],
            "GFLOP per round": [float(operations(run).mean() / 1e9) for run in folders],
            "memory, largest rank, MiB": [max(r["rss_mb"] for r in h) for h in histories.values()],
        }
        for name, values in expected.items():
            mean, std = moments(values)
            assert same_number(row[f"{name} mean"], mean) and same_number(row[f"{name} std"], std), (
                method,
                name,
            )


def test_every_run_is_listed(runs: Path, several: Path) -> None:
    found = {row["run"]: row for row in read_table(several, "runs")}
    assert set(found) == {path.name for path in runs.iterdir()}
    for name, row in found.items():
        assert name == f"{row['method']}-{row['setting'].rpartition(' ')[2]}-{row['seed']}"
        assert (row["rounds"], row["of"]) == ("4", "4")
        assert same_number(row["accuracy"], read_metrics(runs / name)[-1]["accuracy"]["mean"])


@pytest.mark.parametrize(
    ("report", "tables"), [("several", "results accuracies fairness target cost"), ("single", "")]
)
def test_kind_of_deviation_is_named_where_it_is_printed(
    request: pytest.FixtureRequest, report: str, tables: str
) -> None:
    folder = request.getfixturevalue(report)
    over_seeds = "sample standard deviation (divided by n − 1) over seeds"
    over_clients = "std over clients: the population's (divided by n)"
    page = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
    assert page.count(over_seeds) == len(tables.split())
    for name in tables.split():
        assert over_seeds in (folder / "tables" / f"{name}.tex").read_text(encoding="utf-8")
    for name in ["accuracies"] if tables else ["architectures", "alpha"]:
        assert over_clients in (folder / "tables" / f"{name}.tex").read_text(encoding="utf-8")
    if not tables:
        gates = (folder / "tables" / "gate_experts.tex").read_text(encoding="utf-8")
        assert gates.count("population standard deviation") == 2


# One run


def test_client_tables_equal_the_metrics(runs: Path, single: Path) -> None:
    run = runs / "pfedmoe-1.0-0"
    last = read_metrics(run)[-1]["clients"]
    counts = class_counts(run)
    found = read_table(single, "clients")
    accuracy = [float(row["accuracy"]) for row in found]
    assert accuracy == sorted(last["accuracy"]), "worst first"
    for row in found:
        k = int(row["client"])
        assert row["architecture"] == ("mlp5", "mlp4")[k % 2]
        assert row["samples"] == str(last["samples"][k]) == str(counts[k].sum())
        assert row["classes"] == str((counts[k] > 0).sum())
        for name, key in {
            "accuracy": "accuracy",
            "before the sum": "accuracy_before",
            "loss": "loss",
            "α shared": "alpha",
        }.items():
            assert same_number(row[name], last[key][k])
    for row, own in zip(
        read_table(single, "architectures"), (last["accuracy"][0::2], last["accuracy"][1::2]), strict=True
    ):
        mean, std = float(np.mean(own)), float(np.std(own))  # of all clients, not of a sample
        assert row["clients"] == "2" and same_number(row["mean"], mean) and same_number(row["std"], std)
        assert same_number(row["worst"], min(own)) and same_number(row["best"], max(own))


def test_class_count_table_equals_the_partition(runs: Path, single: Path) -> None:
    counts = class_counts(runs / "pfedmoe-1.0-0")
    found = read_table(single, "partition")
    table_of = [[int(row[f"class {c}"]) for c in range(10)] for row in found]
    assert (
        table_of == counts.tolist() and [int(row["samples"]) for row in found] == counts.sum(axis=1).tolist()
    )


def test_gate_weight_table_equals_the_metrics(runs: Path, single: Path) -> None:
    history = read_metrics(runs / "pfedmoe-1.0-0")
    found = read_table(single, "alpha")
    assert [row["round"] for row in found] == ["1", "3", "4"], "first, middle, last"
    for row in found:
        alpha = history[int(row["round"]) - 1]["clients"]["alpha"]
        mean, std = float(np.mean(alpha)), float(np.std(alpha))
        assert same_number(row["mean α"], mean) and same_number(row["std over clients"], std)
        assert same_number(row["lowest"], min(alpha)) and same_number(row["highest"], max(alpha))


def test_gate_tables_equal_the_metrics(runs: Path, single: Path) -> None:
    history = read_metrics(runs / "pfedmoe-1.0-0")
    for row in read_table(single, "gate"):
        gate = history[int(row["round"]) - 1]["gate"]
        assert same_number(row["entropy"], gate["entropy"])
        assert same_number(row["at mean weights"], gate["accuracy"]["constant"])
    found = read_table(single, "gate_experts")
    assert [(row["round"], row["expert"]) for row in found[:2]] == [("1", "shared"), ("1", "own")]
    assert len(found) == 6, "first, middle, last"
    for row in found:
        gate, m = history[int(row["round"]) - 1]["gate"], ("shared", "own").index(row["expert"])
        assert same_number(row["load"], gate["load"][m]) and same_number(row["first"], gate["first"][m])
        assert same_number(row["spread between classes"], gate["spread"]["classes"][m])
        assert same_number(row["disagreement"], gate["disagreement"][m])
        assert same_number(row["without"], gate["accuracy"]["without"][m])


def test_cost_table_equals_the_metrics(runs: Path, single: Path) -> None:
    history = read_metrics(runs / "pfedmoe-1.0-0")
    found = {row["what"]: row for row in read_table(single, "cost")}
    columns = {f"seconds, {name}": [r["seconds"][name] for r in history] for name in history[0]["seconds"]}
    columns |= {
        f"MB, {n}": list(c / 1e6) for n, c in zip(("up", "down", "once"), traffic(history).T, strict=True)
    }
    assert set(found) == {*columns, "memory of the largest rank, MiB"}
    for name, column in columns.items():
        values = np.array([value for value in column if value is not None])
        got = [float(found[name][key]) for key in ("sum", "mean of a round", "largest")]
        assert np.allclose(got, [values.sum(), values.mean(), values.max()], rtol=1e-12), name
    memory = [row["rss_mb"] for row in history]
    assert same_number(found["memory of the largest rank, MiB"]["largest"], max(memory))


def test_target_table_of_one_run_equals_the_metrics(runs: Path, single: Path) -> None:
    run = runs / "pfedmoe-1.0-0"
    history = read_metrics(run)
    found = read_table(single, "target")
    means = [row["accuracy"]["mean"] for row in history]
    listed = [float(row["target"]) for row in found]
    assert listed and means[0] < listed[0] and listed[-1] <= max(means), "none was reached at once"
    for row in found:
        at = reached(history, float(row["target"]))
        assert at is not None and row["round"] == str(at + 1)
        assert same_number(row["MB sent"], traffic(history)[: at + 1].sum() / 1e6)
        assert same_number(row["GFLOP"], operations(run)[: at + 1].sum() / 1e9)


def test_events_and_left_out_clients_are_listed(runs: Path, single: Path) -> None:
    run = runs / "pfedmoe-1.0-0"
    assert [(r["event"], r["round"]) for r in read_table(single, "events")] == [
        ("start", ""),
        ("finish", "4"),
    ]
    lost = [client for row in read_metrics(run) for client in row["lost"]]
    assert lost, "the test has lost clients"
    found = {(row["why"], int(row["client"])): int(row["rounds"]) for row in read_table(single, "left_out")}
    assert found == {("lost before the sum", client): lost.count(client) for client in set(lost)}


def test_settings_and_versions_are_listed(runs: Path, single: Path) -> None:
    changed = {row["setting"]: (row["value"], row["default"]) for row in read_table(single, "changed")}
    assert changed["model.pool"] == ("mlp5,mlp4", "auto") and changed["rounds"] == ("4", "40")
    assert "train.lr" not in changed
    assert not {"model.shared", "model.dim"} & set(changed), "what auto chooses for this pool"
    every = {row["setting"]: row["value"] for row in read_table(single, "settings")}
    assert set(changed) < set(every) and every["train.lr"] == "0.05"
    versions = {row["what"]: row["at the first start"] for row in read_table(single, "versions")}
    start = json.loads((runs / "pfedmoe-1.0-0" / "events.jsonl").read_text().splitlines()[0])
    assert all(versions[name] == str(start[name]) for name in ("torch", "python", "mpi", "threads", "ranks"))
