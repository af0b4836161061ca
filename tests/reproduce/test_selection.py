"""`reproduce --select`: settings are chosen on validation rows, and reported on fresh seeds."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest

from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.reproduce import grid, selection
from pfedmoe_mpi.reproduce.selection import Criteria, Result
from support import launcher
from support.files import path_digest

GRID = """\
title = "Three rates"

[base]
rounds = 2
clients = 3
model.pool = ["mlp5"]
model.shared = "mlp5"
train.device = "cpu"
partition.validation = 0.3

[select]
fresh = [5, 6]

[axis]
algorithm = ["standalone"]
train.lr = [1e-5, 0.05, 1e30]
seed = [0, 1]
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "rates.toml"
    path.write_text(GRID)
    return path


def test_settings_are_chosen_and_trained_with_fresh_seeds(
    table: Path, session: launcher.Session, run_command: Callable[..., launcher.Result]
) -> None:
    """On the digits, with three learning rates, of which one diverges; begun again in the middle."""
    folder, command = table.parent, ("reproduce", str(table), "--select", "validation", "--out", "out")
    said = run_command(*command).out
    tried = {name: [] for name in ("lr0.00001", "lr0.05")}  # type: dict[str, list[float]]
    for name, accuracies in tried.items():
        for seed in (0, 1):
            rows = launcher.read_metrics(folder / "out" / "grid" / f"standalone-{name}-seed{seed}")
            accuracies.append(max(row["accuracy_validation"]["mean"] for row in rows))
    means = {name: fmean(values) for name, values in tried.items()}
    assert means["lr0.05"] > means["lr0.00001"]
    listed = ", ".join(f"{name} {100 * value:.2f} %" for name, value in means.items())
    assert f"\n  standalone: lr0.05 ({listed}, lr1e+30 diverged)\n" in said
    chosen = tomllib.loads((folder / "out" / "selected.toml").read_text())
    assert chosen["axis"]["algorithm"]["standalone"]["train"]["lr"] == 0.05
    assert [each["accuracies"] for each in chosen["chosen"][0]["candidates"][:2]] == [*tried.values()]
    fresh = folder / "out" / "fresh"
    assert {path.name for path in fresh.iterdir()} == {"standalone-seed5", "standalone-seed6"}
    digests = [launcher.checkpoint_digest(fresh / f"standalone-seed{seed}", 2) for seed in (5, 6)]

    shutil.rmtree(fresh / "standalone-seed6")
    before = path_digest(folder / "out" / "grid")
    assert "\n12 runs" not in run_command(*command).out
    assert path_digest(folder / "out" / "grid") == before, "also those that diverged are left alone"
    run_command("reproduce", "out/selected.toml", "--task", "0", "--out", "alone")
    again = [fresh / "standalone-seed6", folder / "alone" / "standalone-seed5"]
    assert [launcher.checkpoint_digest(run, 2) for run in again] == digests[::-1]

    report = run_command("report", "out", "--text").out
    assert (
        "2 runs, seeds 5, 6" in report and "note: settings were chosen on validation rows of other" in report
    )
    values = " ".join(report.split())
    assert f"standalone lr0.05 0, 1 **{100 * means['lr0.05']:.2f} ± " in values
    assert "standalone lr1e+30 0, 1 –" in values
    (folder / "out" / "selected.toml").write_text("chosen = 3")
    message = launcher.error_message(session("report", "out", "--text", cwd=folder), "does not say how")
    assert "report out/fresh" in message


@pytest.mark.parametrize(
    ("change", "flags", "said"),
    [
        (("fresh = [5, 6]", "fresh = [1, 2]"), (), r"seeds of the choice in select.fresh: 1"),
        (("fresh = [5, 6]", 'over = ["train.rl"]'), (), r'select.over = .*train.rl(.|\n)*"train.lr"'),
        (("fresh = [5, 6]", 'over = ["seed"]'), (), r"select.over = "),
        (("fresh = [5, 6]", "fresh = 5"), (), r"select.fresh = 5"),
        (("fresh = [5, 6]", "frehs = [5]"), (), r"select.frehs"),
        (("partition.validation = 0.3", ""), (), r"no validation rows(.|\n)*--partition.validation 0.2"),
        (("", ""), ("--eval.clients", "0.5"), r"eval.clients(.|\n)*--eval.clients 0"),
        (("", ""), ("--only", "*seed0"), "--only = .* leaves out candidates"),
        (("", ""), ("--task", "0"), "--task = 0 leaves out candidates(.|\n)*--out runs/rates/grid"),
        (("", ""), ("--select", "test"), "--select: invalid choice"),
    ],
)
def test_bad_choice_is_refused(
    table: Path,
    assert_refused: Callable[..., str],
    change: tuple[str, str],
    flags: tuple[str, ...],
    said: str,
) -> None:
    table.write_text(GRID.replace(*change), encoding="utf-8")
    assert_refused(said, "reproduce", table, "--select", "validation", *flags)


def test_every_method_and_data_set_has_a_choice_of_its_own(table: Path) -> None:
    """An axis of the problem does not compete; the first of equal candidates is chosen."""
    more = 'algorithm = ["standalone", "fedavg"]\npartition.alpha = [1.0, 9.0]\ntrain.batch = [8, 16]'
    text = GRID.replace('algorithm = ["standalone"]', more).replace("fresh = [5, 6]", "")
    table.write_text(text, encoding="utf-8")
    read = grid.read(table)
    runs = grid.expand(read, {})
    rules = selection.criteria(read, runs)
    assert rules == Criteria(("train.batch", "train.lr"), (0, 1), (2, 3, 4, 5, 6))
    best = {"standalone+alpha9.0": "batch16-lr0.05", "fedavg+alpha1.0": "batch8-lr1e+30"}
    results = {}
    for number, run in enumerate(runs):
        labels = {axis: point.label for axis, point in read.points(number).items()}
        choice = f"{labels['algorithm']}+{labels['partition.alpha']}"
        wins = f"{labels['train.batch']}-{labels['train.lr']}" == best.get(choice)
        results[run.name] = Result(0.9 if wins else 0.5, ("data", labels["partition.alpha"]))
    tree = selection.choose(read, runs, rules, results)
    chosen = {record["choice"]: record["candidate"] for record in tree["chosen"]}
    first = "batch8-lr0.00001"
    assert chosen == {**best, "standalone+alpha1.0": first, "fedavg+alpha9.0": first}
    point = tree["axis"]["selected"]["standalone+alpha9.0"]
    assert (point["train"], point["partition"]) == ({"lr": 0.05, "batch": 16}, {"alpha": 9.0})
    unlike = {**results, runs[0].name: Result(0.5, ("other", "rows"))}
    with pytest.raises(ConfigError, match="unlike rows"):
        selection.choose(read, runs, rules, unlike)
    nothing = {name: Result(float("nan"), each.rows) for name, each in results.items()}
    with pytest.raises(ConfigError, match=r"no candidate of standalone\+alpha1.0 that did not diverge"):
        selection.choose(read, runs, rules, nothing)
