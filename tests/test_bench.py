"""`bench`: its table is printed whole, and its reference is a fair one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pfedmoe_mpi.bench import Line, side_by_side

MPIRUN = str(Path(sys.executable).parent / "mpirun")
SMALL = (
    *("--data.source", "digits", "--clients", "4", "--partition.kind", "iid", "--train.batch", "32"),
    *("--model.pool", "mlp4,mlp5", "--model.shared", "mlp5"),
)
# One client after one round, here and in the bare loop: vectors, losses and accuracies are equal.
FAIR = """
import torch
from pfedmoe_mpi import bareloop, bench, comm, config, federation, setup
from pfedmoe_mpi.flat import flatten
world = comm.start()
settings = config.build({
    "data.source": "synthetic", "data.samples": 500, "clients": 1, "partition.kind": "iid",
    "model.pool": "cnn1", "train.batch": 64, "train.clip": 1.0, "train.augment": "flip,crop",
})
loop = federation.Loop(world, setup.build(world, settings), federation.Silent(), None)
start = torch.cat([loop.state, loop.federation.clients[0].vector])
bare = bareloop.BareLoop(loop.federation, loop.state)
(client,) = bare.clients
assert loop.play()
loss = bare.train(client, 1)
accuracy = bare.accuracy(client)
ours = torch.cat([loop.state, loop.federation.clients[0].vector])
theirs = torch.cat([flatten(module) for module in client.modules()])
row = loop.history[0]
torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
assert (start - ours).abs().max() > 1e-2, "nothing was trained"
assert abs(row["train_loss"] - loss) < 1e-4
assert abs(row["clients"]["accuracy_before"][0] - accuracy) < 1e-9
print("equal")
"""


def launched(ranks: int, *arguments: str, cwd: Path, limit: float = 240) -> tuple[int, str]:
    """(exit code, output) of Python on some ranks, 0 for no mpirun. All of it is killed at the limit."""
    command = [*((MPIRUN, "-n", str(ranks)) if ranks else ()), sys.executable, *arguments]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
    return process.returncode, output


def row(output: str, start: str) -> list[str]:
    """The cells of the table's row that starts so."""
    (line,) = [line for line in output.splitlines() if line.startswith(start)]
    return re.split(r"\s{2,}", line.strip())


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bench")
    parts = ("round", "ranks", "sum", "idle", "precision", "write")
    code, output = launched(2, "-m", "pfedmoe_mpi", "bench", *parts, *SMALL, cwd=folder)
    assert code == 0, output
    assert not list(folder.iterdir()), "bench left something behind"
    return output


@pytest.mark.parametrize(
    ("start", "aim"),
    [
        ("round of digits, N = 4, B = 32, E = 1 vs bare loop", "≤ 1.1"),
        ("speed-up of a round on 2 ranks over 1", "≥ 1.8"),
        ("sum with conversion", "≤ 0.01"),
        ("round of 1 client on 2 ranks vs 1 rank", "≤ 1.3"),
    ],
)
def test_a_ratio_has_both_sides_and_an_aim(table: str, start: str, aim: str) -> None:
    cells = row(table, start)
    assert len(cells) == 5
    assert cells[1].endswith(" s") and cells[2].endswith(" s") and float(cells[3]) > 0
    assert cells[4] in {f"{aim} met", f"{aim} missed"}


def test_what_has_no_aim_everywhere_is_shown_too(table: str) -> None:
    assert float(row(table, "speed-up of bf16 over fp32")[3]) > 0
    assert row(table, "checkpoint of")[1].endswith("MB/s")
    for part in ("train", "evaluate", "sum", "wait"):
        assert row(table, f"  its {part}")[1].endswith(" s")


def test_machine_versions_and_date_stand_above_the_table(table: str) -> None:
    import torch

    lines = table.splitlines()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d", lines[0])
    assert f"torch {torch.__version__}" in lines[1]
    assert "2 rank(s) of 1 thread(s) on 1 host(s)" in lines[2]


def test_the_bare_loop_trains_to_the_same_numbers(tmp_path: Path) -> None:
    code, output = launched(1, "-c", FAIR, cwd=tmp_path)
    assert (code, output.strip()) == (0, "equal")


def test_on_one_rank_only_what_one_rank_can_tell(tmp_path: Path) -> None:
    code, output = launched(0, "-m", "pfedmoe_mpi", "bench", *SMALL, cwd=tmp_path)
    assert code == 0
    assert "bare loop" in output and "over 1" not in output and "1 client" not in output


@pytest.mark.parametrize(
    ("ranks", "words", "message"),
    [
        (2, ("rounds",), "did you mean 'round'"),
        (1, ("ranks",), "compare one rank with several"),
        (1, ("sum", "--algorithm", "fedavg"), "for pfedmoe only"),
        (2, ("start",), "launches ranks itself"),
        (0, ("start", "many"), "takes a number of ranks"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, ranks: int, words: tuple[str, ...], message: str
) -> None:
    code, output = launched(ranks, "-m", "pfedmoe_mpi", "bench", *words, cwd=tmp_path)
    assert code == 2
    assert output.count("error:") == 1 and message in output and "remedy:" in output


def test_start_compares_with_importing_torch(tmp_path: Path) -> None:
    code, output = launched(0, "-m", "pfedmoe_mpi", "bench", "start", "2", *SMALL, cwd=tmp_path)
    assert code == 0, output
    assert re.match(r"≤ 1.2 (met|missed)", row(output, "start of 2 ranks to round 1")[4])


def test_sides_are_warmed_up_then_taken_by_turns() -> None:
    order = []

    def side(name: str, seconds: list[float]) -> float:
        order.append(name)
        return seconds.pop(0)

    ours, reference = [9.0, 1.0, 2.0, 6.0], [9.0, 1.0, 1.0, 2.0]
    pair = side_by_side(lambda: side("a", ours), lambda: side("b", reference), repeats=3)
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
def test_an_aim_is_met_or_missed(ratio: float, at_least: bool, shown: str) -> None:
    assert Line("x", "1 s", "1 s", ratio, 1.1, at_least).text().endswith(shown)
