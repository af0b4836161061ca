"""`reproduce --until`: seeds are added until differences from a baseline are known well enough."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

import pytest

from pfedmoe_mpi.report.compare import Paired
from pfedmoe_mpi.report.precision import MOST, seeds_needed
from pfedmoe_mpi.reproduce import grid
from pfedmoe_mpi.reproduce.seeds import with_seeds
from support import launcher
from support.files import path_digest
from support.mpi_job import run_module

TABLE = """\
[base]
rounds = 1
clients = 3
data.source = "synthetic"
data.samples = 200
data.size = 8
model.pool = ["mlp5"]
model.shared = "mlp5"
train.device = "cpu"

[axis]
algorithm = ["fedavg", "standalone"]
seed = [3, 1]
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "two.toml"
    path.write_text(TABLE)
    return path


def test_seeds_are_added_until_intervals_are_narrow(table: Path, session: launcher.Session) -> None:
    """Five seeds give the first interval, and no more are allowed; a wide goal is reached with them."""
    command = ("reproduce", str(table), "--out", "out", "--until")
    said = session(*command, "0.01", "--most", "5", cwd=table.parent, timeout=240).out
    differences = []
    for seed in (3, 1, 4, 5, 6):
        runs = [table.parent / "out" / f"{method}-seed{seed}" for method in ("fedavg", "standalone")]
        ours, theirs = (launcher.read_metrics(run)[-1]["accuracy"]["mean"] for run in runs)
        differences.append(100 * (ours - theirs))
    mean, half = fmean(differences), 2.776445 * stdev(differences) / math.sqrt(5)  # t of 4 degrees of freedom
    ends = [f"{value:+.2f}".replace("-", "−") for value in (mean, mean - half, mean + half)]
    last = (
        f"{ends[0]} points with 5 seeds, 95 % interval {ends[1]} to {ends[2]}; narrower than 0.01 with about "
    )
    assert f", minus standalone: {last}" in said.splitlines()[-1], said
    assert "with 2 seeds; no interval below 5 seeds" in said
    narrow = session(*command, "100", cwd=table.parent, timeout=240).out
    assert "with 5 seeds" in narrow.splitlines()[-1] and "narrower" not in narrow
    assert not re.search(r"\n[1-9]\d* runs finished", narrow), "all were there already"


def test_stopped_while_seeds_are_added_it_goes_on_as_if_it_had_not_been(
    table: Path, session: launcher.Session
) -> None:
    """The first added run is stopped after one of its two rounds; the second call has another rank count."""
    command = ("reproduce", str(table), "--rounds", "2", "--until", "0.01", "--most", "5", "--out")
    out, whole = table.parent / "out", table.parent / "whole"
    in_its_first_round = ("stop", "0", f"record:{4 * 2 + 1}")
    ended = run_module("fault_injection", *in_its_first_round, *command, str(out), ranks=2)
    assert ended.code == 75, ended.output
    added = [path for path in out.iterdir() if not path.name.endswith(("seed3", "seed1"))]
    assert [launcher.read_events(path)[-1]["event"] for path in added] == ["stop"]
    again = session(*command, str(out), cwd=table.parent, timeout=240)
    alone = session(*command, str(whole), cwd=table.parent, timeout=240)
    assert again.code == alone.code == 0, again.err + alone.err
    assert again.out.splitlines()[-1] == alone.out.splitlines()[-1]
    assert "with 5 seeds" in again.out.splitlines()[-1]
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names and len(names) == 10
    for name in names:
        digests = [launcher.checkpoint_digest(folder / name, 2) for folder in (out, whole)]
        assert digests[0] == digests[1], name
    before = path_digest(out)
    assert session(*command, str(out), cwd=table.parent, timeout=240).code == 0
    assert path_digest(out) == before, "all were there already"


def test_number_of_seeds_is_the_first_that_is_enough() -> None:
    """Two differences of sample deviation 1 point: 2 · t · 1 / √n, with t from tables."""
    paired = Paired((0, 1), (0.0, math.sqrt(2) / 100), 0.0, None, None)
    assert seeds_needed(paired, 1.01) == 18  # t(17) = 2.1098: 0.9946; t(16) = 2.1199: 1.0283
    assert seeds_needed(paired, 5.0) == 5 and seeds_needed(paired, 1e-9) == MOST
    assert seeds_needed(Paired((0,), (0.1,), 0.1, None, None), 1.0) == 5


def test_baseline_in_several_settings_is_refused_before_anything_is_trained(
    table: Path, assert_refused: Callable[..., str]
) -> None:
    table.write_text(TABLE + "train.lr = [0.01, 0.05]\n", encoding="utf-8")
    said = r"standalone is not one method(.|\n)*--baseline 'standalone \(train\.lr = 0\.01\)'"
    assert_refused(said, "reproduce", table, "--until", "5", "--out", "out")
    assert not (table.parent / "out").exists()


def test_seeds_of_a_choice_are_not_added(tmp_path: Path) -> None:
    (tmp_path / "table.toml").write_text(TABLE.replace("[3, 1]", "[0, 1]"), encoding="utf-8")
    more = with_seeds(grid.read(tmp_path / "table.toml"), 4, taken=(2, 3))
    assert [point.settings["seed"] for point in more.axes["seed"]] == [0, 1, 4, 5]


def test_a_run_that_fails_adds_no_seeds(table: Path, session: launcher.Session) -> None:
    """The others are trained, and the reason is said."""
    wild = '[axis.algorithm.{}]\nalgorithm = "{}"\ntrain.lr_shared = {}\n'
    methods = "".join(wild.format(*each) for each in (("a", "standalone", 0.1), ("b", "fedavg", 1e30)))
    table.write_text(TABLE.replace('algorithm = ["fedavg", "standalone"]\n', "") + methods, encoding="utf-8")
    ended = session("reproduce", str(table), "--out", "out", "--until", "5", cwd=table.parent, timeout=240)
    assert ended.code == 1 and "no seeds are added while a run fails" in ended.out
    assert sorted(path.name for path in (table.parent / "out").iterdir())[-1] == "seed3-b"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--until", "0"), "--until: expected a number of points"),
        (("--until", "1", "--baseline", "fedavk"), "compares the others with fedavk"),
        (("--until", "1", "--only", "fedavg*"), r"have only: fedavg(.|\n)*--baseline NAME"),
        (("--until", "1", "--task", "0"), "--task = 0 is one run"),
        (("--until", "1", "--most", "1"), r"--most = 1 is less than the 2 seeds(.|\n)*--most 5"),
        (("--until", "1", "--most", "4"), "--most = 4, but there is no interval below 5 seeds"),
    ],
)
def test_comparison_that_seeds_cannot_narrow_is_refused(
    table: Path, assert_refused: Callable[..., str], flags: tuple[str, ...], said: str
) -> None:
    assert_refused(said, "reproduce", table, *flags)
    table.write_text(TABLE.replace("seed = [3, 1]", ""), encoding="utf-8")
    assert_refused("has no axis seed" if flags[1] != "0" else said, "reproduce", table, *flags)
