"""`bench`: its table is complete, and its reference is fair."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import torch

import pfedmoe_mpi
from pfedmoe_mpi import config
from pfedmoe_mpi.bench import bare_loop, command
from pfedmoe_mpi.bench import start as bench_start
from pfedmoe_mpi.bench import wide as bench_wide
from pfedmoe_mpi.bench.network import Sent, bytes_sent, crossed, per_round
from pfedmoe_mpi.bench.progress import Stage, estimated_round, in_words
from pfedmoe_mpi.bench.timing import Line, side_by_side
from pfedmoe_mpi.core.flat import flatten
from pfedmoe_mpi.federation import build
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from support.launcher import Result, run_program
from support.small_federation import shared_comm

SMALL = (
    *("--data.source", "digits", "--clients", "4", "--partition.kind", "iid", "--train.batch", "32"),
    *("--model.pool", "mlp4,mlp5", "--model.shared", "mlp5"),
)


def row(output: str, start: str) -> list[str]:
    """Return the cells of the table row that starts with this text."""
    (line,) = [line for line in output.splitlines() if line.startswith(start)]
    return re.split(r"\s{2,}", line.strip())


PARTS = ("round", "ranks", "sum", "idle", "precision", "write", "network")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("bench")
    result = run_program(2, "bench", *PARTS, *SMALL, cwd=folder, timeout=240)
    assert result.code == 0, result.err
    assert not list(folder.iterdir()), "bench left something behind"
    return result


@pytest.fixture(scope="module")
def table(measured: Result) -> str:
    return measured.out


def test_every_stage_is_announced_with_its_expected_duration(measured: Result) -> None:
    lines = [line for line in measured.err.splitlines() if "left" not in line]
    stages = [line.partition(": about ")[0] for line in lines if ": about " in line]
    assert stages == list(PARTS)
    assert lines[0].startswith("starting: ") and lines[1] == "building 4 clients on 2 ranks"
    assert all(re.search(r"about \d+ (s|min)$", line) for line in lines if ": about " in line)


def test_stage_prints_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 8.0, 20.0, 22.0, 1000.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    stage = Stage("round", 45.4)
    assert capsys.readouterr().err == "round: about 45 s\n", "before the first pair"
    for done in (1, 2, 3, 4):
        stage.pair_done(done, 4)
    assert capsys.readouterr().err == "round: 2 of 4 pairs measured, about 20 s left\n"
    assert (in_words(0.1), in_words(119), in_words(200)) == ("1 s", "119 s", "3 min")


@pytest.mark.parametrize(
    ("start", "aim"),
    [
        ("round of digits, N = 4, B = 32, E = 1 vs bare loop", "≤ 1.1"),
        ("speed-up of a round on 2 ranks over 1", "≥ 1.8"),
        ("sum with conversion", "≤ 0.01"),
        ("round of 1 client on 2 ranks vs 1 rank", "≤ 1.3"),
    ],
)
def test_ratio_prints_both_sides_and_its_target(table: str, start: str, aim: str) -> None:
    cells = row(table, start)
    assert len(cells) == 5
    assert cells[1].endswith(" s") and cells[2].endswith(" s") and float(cells[3]) > 0
    assert cells[4] in {f"{aim} met", f"{aim} missed"}


def test_quantities_without_target_are_printed(table: str) -> None:
    assert float(row(table, "speed-up of bf16 over fp32")[3]) > 0
    assert row(table, "checkpoint of")[1].endswith("MB/s")
    for part in ("train", "evaluate", "sum", "wait"):
        assert row(table, f"  its {part}")[1].endswith(" s")


def test_bytes_are_printed_beside_their_formulas(table: str) -> None:
    _, client, formula, ratio = row(table, "deployment: one client's bytes, up and down")
    assert client == formula and ratio == "1.000"
    assert float(row(table, "deployment: those of a cohort of 4")[1].split()[0]) == pytest.approx(
        4 * float(client.split()[0]), rel=1e-3
    )
    _, _, numbers, ratio = row(table, "MPI: summed, int64")
    assert numbers == formula, "8 bytes once, or 4 bytes twice"
    assert 1 <= float(ratio) < 1.01, "flags and metrics"
    assert row(table, "MPI: one host, so nothing crosses")[1] == "0 MB"
    assert "rate of the sum" not in table
    for title in ("round on this link", "  sum, slowest rank"):
        assert title in table


COUNTED = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls ...
    lo:  900000       4    0    0    0     0          0         0   900000       4    0    0    0     0
  eth0: 5000000      40    0    0    0     0          0         0     7000      30    0    0    0     0
 bond0:12345678      50    0    0    0     0          0         0     8000      40    0    0    0     0
"""


def test_counters_report_the_busiest_interface() -> None:
    before = bytes_sent(COUNTED)
    assert before == {"eth0": 7000, "bond0": 8000}
    after = {"a": {"eth0": 27_000, "bond0": 28_500, "new": 3}, "b": before, "c": {}}
    assert per_round({"a": before, "b": before, "c": {}}, after, 5) == [
        Sent("a", "bond0", 4100),
        Sent("b", "eth0", 0),
        Sent("c", "no interface", 0),
    ]


def test_all_reduce_sends_at_least_its_share_from_every_host() -> None:
    three = crossed([Sent("a", "eth0", 4e6), Sent("b", "ib0", 0), Sent("c", "eth1", 8e6)], 3_000_000)
    assert [line.ratio for line in three] == [1, 0, 2]
    assert three[1].what == "MPI: sent by b over ib0" and three[1].reference == "4 MB"
    assert [line.ratio for line in crossed([Sent("a", "eth0", 5)], 3_000_000)] == [None]


def test_quick_measures_little_data_few_times(tmp_path: Path) -> None:
    result = run_program(0, "bench", "round", "--quick", *SMALL[2:], cwd=tmp_path, timeout=240)
    assert result.code == 0, result.err
    assert "\nquick: 3 pairs instead of 5, little data\n" in result.out
    assert row(result.out, "round of synthetic, N = 4")
    settings = {**command.DEFAULTS, **command.QUICK}
    assert settings["data.samples"] == command.DEFAULTS["data.samples"] / 10


def test_table_heading_names_machine_versions_and_date(table: str) -> None:
    lines = table.splitlines()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d", lines[0])
    assert f"torch {torch.__version__}" in lines[1]
    assert "2 rank(s) of 1 thread(s) on 1 host(s)" in lines[2]


def test_bare_loop_trains_to_the_same_numbers() -> None:
    """One client, one round: the vectors of all three modules, the loss and the accuracy before the sum."""
    settings = config.build(
        {
            **{"data.source": "synthetic", "data.samples": 500, "clients": 1, "partition.kind": "iid"},
            **{"model.pool": "cnn1", "train.batch": 64, "train.clip": 1.0, "train.augment": "flip,crop"},
            **{"train.lr_shared": 0.02, "train.schedule": "cosine", "rounds": 3, "train.device": "cpu"},
        }
    )
    loop = Loop(shared_comm(), build.build(shared_comm(), settings), SilentObserver(), None)
    before = torch.cat([loop.state, loop.federation.clients[0].vector])
    bare = bare_loop.BareLoop(loop.federation, loop.state)
    (client,) = bare.clients
    for round in (1, 2):
        assert loop.run_round()
        loss, accuracy = bare.train(client, round), bare.accuracy(client)
        after = torch.cat([loop.state, loop.federation.clients[0].vector])
        theirs = torch.cat([flatten(module) for module in client.modules()])
        torch.testing.assert_close(theirs, after, atol=1e-4, rtol=1e-4)
        assert (after - before).abs().max() > 1e-2, "nothing was trained"
        assert loop.history[-1]["train_loss"] == pytest.approx(loss, abs=1e-4)
        assert loop.history[-1]["clients"]["accuracy_before"][0] == pytest.approx(accuracy)


def test_bare_loop_leaves_the_federation_unchanged() -> None:
    settings = config.build({"data.source": "synthetic", "data.samples": 100, "clients": 2})
    loop = Loop(shared_comm(), build.build(shared_comm(), settings), SilentObserver(), None)
    vectors = [loop.state, *(client.vector for client in loop.federation.clients.values())]
    before = [vector.clone() for vector in vectors]
    bare_loop.BareLoop(loop.federation, loop.state).run_round(1)
    assert estimated_round(loop) > 0
    assert all(torch.equal(a, b) for a, b in zip(vectors, before, strict=True))


def test_one_rank_prints_only_single_rank_rows(tmp_path: Path) -> None:
    result = run_program(0, "bench", *SMALL, cwd=tmp_path, timeout=240)
    assert result.code == 0, result.err
    assert "bare loop" in result.out and "over 1" not in result.out and "1 client" not in result.out


@pytest.mark.parametrize(
    ("ranks", "words", "message"),
    [
        (2, ("rounds",), "did you mean 'round'"),
        (1, ("ranks",), "compare one rank with several"),
        (1, ("sum", "--algorithm", "fedavg"), "for pfedmoe only"),
        (2, ("start",), "launches ranks itself"),
        (0, ("start", "many"), "takes a number of ranks"),
        (2, ("wide",), "launches ranks itself"),
        (0, ("wide", "0"), "takes the largest number of ranks"),
        (2, ("scale",), "launches ranks itself"),
        (0, ("scale", "writer"), "did you mean 'writers'"),
        (0, ("scale", "1", "2"), "one number of ranks"),
        (0, ("scale", "fedavg", "--figure", "c.svg"), "add clients"),
        (0, ("scale", "--figure", "c.txt"), "is not a file .svg"),
        (0, ("sum", "--figure", "c.svg"), "by bench scale alone"),
    ],
)
def test_impossible_benchmarks_are_refused(
    tmp_path: Path, ranks: int, words: tuple[str, ...], message: str
) -> None:
    result = run_program(ranks, "bench", *words, cwd=tmp_path)
    assert (result.code, result.out) == (2, "")
    assert result.err.count("error:") == 1 and message in result.err and "remedy:" in result.err


def test_start_is_compared_with_importing_torch(tmp_path: Path) -> None:
    result = run_program(0, "bench", "start", "1", "--quick", *SMALL, cwd=tmp_path, timeout=240)
    assert result.code == 0, result.err
    assert re.search(r"^start: one start of 1 ranks .*\nstart: about \d+ (s|min)$", result.err, re.MULTILINE)
    assert re.match(r"≤ 1.2 (met|missed)", row(result.out, "start of 1 ranks to round 1")[4])


def test_wide_jobs_are_timed_and_fitted(tmp_path: Path) -> None:
    result = run_program(0, "bench", "wide", "2", cwd=tmp_path, timeout=240)
    assert result.code == 0, result.err
    rows = [re.split(r" {2,}", line.strip()) for line in result.out.splitlines() if re.match(" +[12] ", line)]
    assert [cells[0] for cells in rows] == ["1", "2"]
    assert all(float(value) > 0 for cells in rows for value in cells[1:])
    lines = re.findall(r"^(start|overhead|end): \S+ s \+ \S+ ms for each rank$", result.out, re.MULTILINE)
    assert lines == ["start", "overhead", "end"]
    assert bench_wide.line([1, 2, 4], [3.0, 5.0, 9.0]) == (pytest.approx(1.0), pytest.approx(2.0))


def test_started_ranks_import_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do so in any folder, and no module of the package hides one of another package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    code = (
        "import importlib.util, pfedmoe_mpi\n"
        f"assert pfedmoe_mpi.__file__ == {pfedmoe_mpi.__file__!r}, pfedmoe_mpi.__file__\n"
        "assert not importlib.util.find_spec('client_model')\n"
        "print('imported', flush=True)"
    )
    assert bench_start._seconds_until([sys.executable, "-c", code], "imported", 1) > 0


def test_both_sides_are_warmed_up_then_alternated() -> None:
    order = []

    def side(name: str, seconds: list[float]) -> float:
        order.append(name)
        return seconds.pop(0)

    ours, reference = [9.0, 1.0, 2.0, 6.0], [9.0, 1.0, 1.0, 2.0]
    pairs: list[tuple[int, int]] = []
    pair = side_by_side(
        lambda: side("a", ours), lambda: side("b", reference), 3, lambda done, all: pairs.append((done, all))
    )
    assert pairs == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert (pair.ours, pair.reference, pair.ratio) == (2.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("ratio", "at_least", "shown"),
    [
        (1.1, False, "≤ 1.1 met"),
        (1.2, False, "≤ 1.1 missed"),
        (1.1, True, "≥ 1.1 met"),
        (1.0, True, "missed"),
    ],
)
def test_target_is_met_or_missed(ratio: float, at_least: bool, shown: str) -> None:
    assert Line("x", "1 s", "1 s", ratio, 1.1, at_least).text().endswith(shown)


def test_thousands_of_clients_are_measured(tmp_path: Path) -> None:
    """All parts at a small size: the table, the figure, and a run that is stopped and restarted."""
    result = run_program(0, "bench", "scale", "1", "--quick", "--figure", "c.svg", cwd=tmp_path, timeout=240)
    assert result.code == 0, result.err
    columns = (
        "clients",
        "setup",
        "round",
        "first",
        "evaluation",
        "checkpoint",
        "written",
        "changed",
        "memory",
    )
    assert [column in result.out.splitlines()[1] for column in columns] == [True] * len(columns)
    rows = [
        line.split() for line in result.out.splitlines() if line.startswith(("clients", "writers", "fedavg"))
    ]
    assert [cells[:2] for cells in rows] == [
        ["clients", "20"],
        ["clients", "60"],
        ["writers", "6"],
        ["fedavg", "200"],
    ]
    assert all(float(value.replace(",", "")) > 0 for cells in rows[:2] for value in cells[1:3])
    assert [len(cells) for cells in rows] == [10, 10, 9, 8], (
        "only the first are compared; fedavg changes no client"
    )
    assert "<svg" in (tmp_path / "c.svg").read_text() and os.listdir(tmp_path) == ["c.svg"]
    said = result.out[result.out.index("restart ") :]
    assert re.search(
        r"stopped with round-\d+-partial\.h5, restarted on 2 rank\(s\): the undisturbed digest", said
    )
    assert "≤ 4 GB met" in said
