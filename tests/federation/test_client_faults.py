"""Client failures as an experiment: lost, slow and late clients repeat, and the others are summed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pfedmoe_mpi.config.sections import FaultSettings
from pfedmoe_mpi.errors import EXIT_DONE
from pfedmoe_mpi.federation.faults import Faults
from pfedmoe_mpi.federation.loop import Loop
from pfedmoe_mpi.federation.round_sum import IN, LATE, LOST
from support import launcher
from support.launcher import SMALL_RUN, checkpoint_digest, read_metrics, reproducible_rows
from support.small_federation import build_loop, write_data_files

UNEQUAL = [1.0, 2.0, 3.0, 2.0] * 25  # mean 2
EXPERIMENT = (
    *(*SMALL_RUN, "--clients", "8", "--rounds", "6", "--faults.dropout", "0.3", "--faults.straggler", "0.25"),
    *("--faults.slowdown", "4", "--faults.deadline", "3", "--run.checkpoint_every", "3"),
)


def drawn(seed: int = 0, **settings: float) -> Faults:
    return Faults(seed, FaultSettings(**settings), UNEQUAL)


def fates(faults: Faults, rounds: int = 50) -> list[list[int]]:
    return [[faults.fate(round, k) for k in range(len(UNEQUAL))] for round in range(1, rounds + 1)]


# What is drawn


def test_no_faults_by_default() -> None:
    faults = drawn()
    assert {fate for row in fates(faults) for fate in row} == {IN}
    assert faults.durations == [cost / 2 for cost in UNEQUAL] and faults.waited([0, 2]) == 1.5


def test_dropout_is_a_probability_per_client_and_round() -> None:
    found = fates(drawn(dropout=0.3))
    lost = sum(fate == LOST for row in found for fate in row)
    assert 0.27 < lost / 5000 < 0.33
    assert len({tuple(row) for row in found}) == 50, "drawn anew every round"
    assert found == fates(drawn(dropout=0.3)) != fates(drawn(seed=1, dropout=0.3))
    assert {fate for row in fates(drawn(dropout=1.0)) for fate in row} == {LOST}


def test_stragglers_are_a_fixed_share_of_clients() -> None:
    faults, plain = drawn(straggler=0.2, slowdown=7.0), drawn()
    slow = [k for k in range(100) if faults.durations[k] != plain.durations[k]]
    assert len(slow) == 20
    assert all(faults.durations[k] == 7 * plain.durations[k] for k in slow)
    assert slow != [
        k for k, d in enumerate(drawn(seed=1, straggler=0.2).durations) if d != plain.durations[k]
    ]


def test_deadline_leaves_out_slow_clients() -> None:
    late = drawn(deadline=1.2)
    assert [late.fate(1, k) for k in range(4)] == [IN, IN, LATE, IN]
    assert late.waited(range(4)) == 1.2 and late.waited([0]) == 0.5 and late.waited([]) == 0.0
    slow = drawn(straggler=1.0, slowdown=10.0, deadline=6.0)
    assert [slow.fate(1, k) for k in range(4)] == [IN, LATE, LATE, LATE]


# What becomes of it


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_data_files(tmp_path_factory.mktemp("faults"))


def test_lost_client_trains_but_is_not_summed(data: dict[str, Path]) -> None:
    """Its private state is trained; the mean is that of the others, weighted by their samples."""
    calm = train_round(data["small"])
    seed = next(s for s in range(100) if _lost(s) == [1])
    lossy = train_round(data["small"], seed=seed, faults__dropout=0.4)
    same = train_round(data["small"], seed=seed)
    row = lossy.history[0]
    assert (row["lost"], row["late"], row["dropped"]) == ([1], [], [])
    assert calm.history[0]["lost"] == [] and row["clients"]["accuracy_before"][1] is None
    for k in range(3):  # trained from the same start in round 1
        mine, other = (loop.federation.clients[k].vector for loop in (lossy, same))
        assert torch.equal(mine, other)
    n = [lossy.federation.task.samples(k) for k in range(3)]
    assert not torch.equal(lossy.state, same.state)
    alone = {k: train_round(data["small"], seed=seed, only=k).state.double() for k in (0, 2)}
    expected = (n[0] * alone[0] + n[2] * alone[2]) / (n[0] + n[2])
    torch.testing.assert_close(lossy.state.double(), expected, rtol=1e-6, atol=1e-7)


def _lost(seed: int) -> list[int]:
    faults = Faults(seed, FaultSettings(dropout=0.4), [1.0] * 3)
    return [k for k in range(3) if faults.fate(1, k) == LOST]


def train_round(path: Path, only: int | None = None, **changes: object) -> Loop:
    """Train one round of three clients, or of one of them."""
    loop = build_loop(path, "pfedmoe", model__pool="mlp5", rounds=1, participation=1.0, **changes)
    if only is not None:
        loop.federation.method.cohort = lambda round: [(only, "client")]  # type: ignore[method-assign]
    loop.run()
    return loop


def test_faults_repeat_on_other_ranks_and_after_restart(tmp_path: Path) -> None:
    found = {}
    for ranks in (1, 3):
        launcher.run_to_end(ranks, *EXPERIMENT, "--run.dir", str(ranks), cwd=tmp_path)
        found[ranks] = checkpoint_digest(tmp_path / str(ranks), 6)
    launcher.run_to_end(2, *EXPERIMENT, "--rounds", "3", "--run.dir", "again", cwd=tmp_path)
    launcher.run_to_end(2, "restart", "again", "--rounds", "6", cwd=tmp_path)
    found[2] = checkpoint_digest(tmp_path / "again", 6)
    assert len(set(found.values())) == 1, found
    assert reproducible_rows(tmp_path / "again") == reproducible_rows(tmp_path / "1")
    history = read_metrics(tmp_path / "1")
    assert any(row["lost"] for row in history) and all(row["late"] or row["lost"] for row in history)
    assert max(row["simulated_time"] for row in history) == 3.0, "the server waits until the deadline"


def test_left_out_clients_are_counted_at_the_end(session: launcher.Session, tmp_path: Path) -> None:
    result = session(*EXPERIMENT, "--rounds", "3", "--run.dir", "run", cwd=tmp_path)
    assert result.code == EXIT_DONE, result.err
    counted = [line for line in result.out.splitlines() if line.startswith("left out, ")]
    assert {line.partition(":")[0] for line in counted} == {"left out, lost", "left out, after the deadline"}
    lost = [client for row in read_metrics(tmp_path / "run") for client in row["lost"]]
    assert f"client {min(lost)} ({lost.count(min(lost))} ×)" in result.out


def test_round_that_loses_all_keeps_the_shared_state(data: dict[str, Path]) -> None:
    """Losing all clients of a round is not divergence: the run continues."""
    loop = build_loop(data["small"], "pfedmoe", model__pool="mlp5", rounds=2, faults__dropout=1.0)
    before = loop.state.clone()
    assert loop.run() and torch.equal(loop.state, before)
    assert [row["lost"] for row in loop.history] == [row["cohort"] for row in loop.history]
