"""The command `fork`: what a branch shares with its run, what it may change, and the report on both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from pfedmoe_mpi import config
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.report import fork_section, peer_section
from pfedmoe_mpi.report.load import load_run
from pfedmoe_mpi.run import console, fork
from support.launcher import (
    SMALL_RUN,
    Result,
    checkpoint_digest,
    read_events,
    reproducible_rows,
    shared_session,
)
from support.mpi_job import run_module


def test_fork_repeats_the_run_where_no_change_has_an_effect(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    """The rank count differs too: every draw of the fork is that of the run."""
    run_command("fork", run, "--at", "2", "--run.keep", "9", "--run.dir", "fork")
    made = tmp_path / "fork"
    assert reproducible_rows(made) == reproducible_rows(run)
    newest = "checkpoints/round-000003.h5"
    with Checkpoint(run / newest) as one, Checkpoint(made / newest) as other:
        np.testing.assert_array_equal(one.state, other.state)
        for client in range(4):
            np.testing.assert_array_equal(one.vector(client), other.vector(client))


def test_fork_of_another_method_begins_its_gate_by_its_own_default(run: Path) -> None:
    with Checkpoint(run / "checkpoints" / "round-000003.h5") as loaded:
        assert loaded.config["gate"]["start"] == "even"
        settings, changes = fork._settings(loaded, {"algorithm": "standalone", "rounds": 9})
    assert settings.gate.start == "auto" and "gate.start" not in changes


def test_fork_keeps_common_parts_and_repeats_on_any_ranks_and_through_a_restart(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    change = ("--at", "2", "--gate.weights", "equal", "--rounds")
    on_two = shared_session(2)("fork", str(run), *change, "5", "--run.dir", "two", cwd=tmp_path)
    assert on_two.code == 0 and on_two.err.count("the fork does not have: gate") == 1, on_two.err
    run_command("fork", run, *change, "4", "--run.dir", "one")
    run_command("restart", "one", "--rounds", "5", "--eval.every", "2")
    assert reproducible_rows(tmp_path / "one")[4] == reproducible_rows(tmp_path / "two")[4]
    assert reproducible_rows(tmp_path / "one")[:2] == reproducible_rows(run)[:2]
    with (
        Checkpoint(run / "checkpoints/round-000002.h5") as before,
        Checkpoint(tmp_path / "one/checkpoints/round-000005.h5") as one,
        Checkpoint(tmp_path / "two/checkpoints/round-000005.h5") as two,
    ):
        np.testing.assert_array_equal(one.state, two.state)
        assert before.layout(0).parts.keys() - one.layout(0).parts.keys() == {"gate"}
        for client in range(4):
            np.testing.assert_array_equal(one.vector(client), two.vector(client))
    event = read_events(tmp_path / "two")[0]
    assert event["fork"]["round"] == 2 and event["fork"]["settings"]["gate.weights"] == ["sample", "equal"]
    assert event["fork"]["run"] == str(run.resolve())


def test_fork_of_a_stopped_run_that_is_stopped_itself_ends_as_one_that_nobody_stopped(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    """Both are stopped within a round, when some clients have trained; the fork ends on one rank."""
    flags = ("--rounds", "3", "--eval.every", "2", "--run.checkpoint_every", "1")
    stopped, made = tmp_path / "stopped", tmp_path / "made"
    within = ("fault_injection", "stop", "1")
    ended = run_module(*within, "training:6", *SMALL_RUN, *flags, "--run.dir", str(stopped), ranks=2)
    assert ended.code == 75 and read_events(stopped)[-1]["round"] == 2, ended.output
    change = ("--at", "2", "--gate.weights", "equal", "--rounds", "5", "--run.dir")
    ended = run_module(*within, "training:4", "fork", str(stopped), *change, str(made), ranks=2)
    assert ended.code == 75 and read_events(made)[-1]["round"] == 3, ended.output
    for folder, round in ((stopped, 3), (made, 4)):
        assert list(folder.glob(f"checkpoints/round-00000{round}-partial.h5")), "some clients have trained"
    run_command("restart", made)
    assert read_events(made)[-1]["event"] == "finish"
    run_command("fork", run, *change, "whole")
    assert reproducible_rows(made) == reproducible_rows(tmp_path / "whole")
    assert checkpoint_digest(made, 5) == checkpoint_digest(tmp_path / "whole", 5)


def test_fork_may_change_the_method_if_parts_have_the_same_names(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    """A part that the run does not have begins as in a new run."""
    result = run_command("fork", run, "--at", "2", "--algorithm", "fedproto", "--run.dir", "fork")
    assert "that begin with the fork: prototypes" in result.err
    assert len(reproducible_rows(tmp_path / "fork")) == 3


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (("--at", "2"), "no setting differs"),
        (("--at", "0", "--gate.weights", "equal"), r"no checkpoint of round 0\n(.|\n)*train a new run"),
        (("--at", "9", "--gate.weights", "equal"), "no checkpoint of round 9; it has these rounds: 2, 3"),
        (("--at", "3", "--gate.weights", "equal"), "rounds = 3, but the fork begins after round 3"),
        (("--at", "2", "--gate.hidden", "7"), "'gate' has another architecture"),
        (("--at", "2", "--seed", "7"), "cannot be changed now: seed"),
        (("--at", "2", "--partition.alpha", "7"), "cannot be changed now: partition.alpha"),
        (("--at", "2", "--model.pool", "mlp3"), "cannot be changed now: model.pool"),
    ],
)
def test_fork_refuses(
    run_command: Callable[..., Result],
    assert_refused: Callable[..., str],
    run: Path,
    flags: tuple[str, ...],
    pattern: str,
) -> None:
    assert_refused(pattern, "fork", run, *flags, "--run.dir", "fork")


def test_fork_refuses_a_folder_that_is_not_a_run(assert_refused: Callable[..., str], tmp_path: Path) -> None:
    assert_refused("is not a run folder", "fork", tmp_path, "--at", "2", "--gate.weights", "equal")


def test_report_pairs_run_and_fork_by_client(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    """Two forks of one round are each paired with the run, not with each other."""
    for name, change in (("a", ("--gate.weights", "equal")), ("b", ("--train.lr", "0.5"))):
        run_command("fork", run, "--at", "2", *change, "--run.dir", name)
    runs = [load_run(path) for path in (run, tmp_path / "a", tmp_path / "b")]
    assert [(of.path.name, fork.path.name, at) for of, fork, at in fork_section.pairs(runs)] == [
        ("run", "a", 2),
        ("run", "b", 2),
    ]
    rounds, table = fork_section.differences((runs[0], runs[1], 2))
    assert rounds.tolist() == [2, 3] and (table[0] == 0).all()
    last = [np.array(each.history[2]["clients"]["accuracy"]) for each in runs[:2]]
    np.testing.assert_array_equal(table[1], last[1] - last[0])
    listed = fork_section.sections(runs)[0].tables[1].rows
    ours, theirs = (np.array(runs[n].history[2]["clients"]["accuracy"]) for n in (0, 2))
    of_b = [[cell.values[0] for cell in row[1:]] for row in listed if row[0].text == "b"]
    assert sorted(of_b) == [[k, ours[k], theirs[k], theirs[k] - ours[k]] for k in range(4)]
    changes = [change for *_, change in of_b]
    assert changes == sorted(changes) and changes != [0.0] * 4 and len(listed) == 8
    text = run_command("report", "run", "a", "--text").out
    assert "gate.weights sample → equal" in text.partition("Forks, client by client")[2]
    assert "Forks" not in run_command("report", "a", "b", "--text").out


OWN = '''
from pydantic import Field

from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.config.sections import Section


class Options(Section):
    k: int = Field(3, ge=1)
    """A number. Default: three."""


class Second(Algorithm):
    def client_state(self, client):
        return {"model": self.task.model(self.task.architecture(client)), "late": self.task.head()}

    def predict(self, parts, x):
        return parts.late(parts.model.extractor(x))
'''


def test_fork_to_a_file_of_ones_own_and_back(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    """A second stage: its file is no change of code, and its settings stay behind on the way back."""
    (tmp_path / "second.py").write_text(OWN)
    own = ("--algorithm", "second.py", "--second.k", "4", "--rounds", "4", "--run.dir", "own")
    result = run_command("fork", run, "--at", "2", *own)
    assert "that begin with the fork: late" in result.err
    with Checkpoint(tmp_path / "own/checkpoints/round-000004.h5") as loaded:
        assert loaded.config["second"]["k"] == 4 and "second.py" in loaded.code
    run_command("fork", "own", "--at", "4", "--algorithm", "standalone", "--rounds", "5", "--run.dir", "back")
    with Checkpoint(tmp_path / "back/checkpoints/round-000005.h5") as loaded:
        assert "second" not in loaded.config and not loaded.code
    digest = sha256(OWN.encode()).hexdigest()
    newest = "own/checkpoints/round-000004.h5"
    assert f"own code, second.py: {digest}" in run_command("inspect", newest).out
    assert f"| own code, second.py, SHA-256 | {digest} |" in run_command("verify", "own", "--rounds", "1").out
    changed = read_events(tmp_path / "own")[0]["fork"]["settings"]
    assert changed["second.k"] == [3, 4] and changed["algorithm"][0] == "pfedmoe"
    (tmp_path / "second.py").write_text(OWN + "\n")
    again = ("fork", "own", "--at", "4", "--second.k", "2", "--rounds", "5", "--run.dir", "again")
    refused = shared_session(1)(*again, cwd=tmp_path)
    assert refused.code == 2 and "your own code changed since the checkpoint" in refused.err


def test_patience_of_a_fork_counts_its_own_rounds(run_command: Callable[..., Result], tmp_path: Path) -> None:
    """Nothing is learned, so that round 5, its first, is its best, and two more follow."""
    (tmp_path / "second.py").write_text(OWN)
    every = ("--partition.validation", "0.2", "--eval.every", "1", "--rounds", "4")
    run_command(*SMALL_RUN, *every, "--data.samples", "400", "--run.dir", "run")
    own = ("--algorithm", "second.py", "--train.lr", "1e-9", "--run.patience", "2", "--run.dir", "own")
    result = run_command("fork", "run", "--at", "4", *own, "--rounds", "9")
    forked = load_run(tmp_path / "own")
    best = {row["round"]: row["accuracy_validation"]["mean"] for row in forked.history}
    assert max(best[n] for n in range(1, 5)) > best[5], "the run before it was better"
    assert forked.done == 7 and forked.ended_early and "ended after 7 of 9 rounds" in result.out
    settings = config.build(config.flatten(config.read_toml(tmp_path / "own/config.toml")))
    assert not replace(forked, history=forked.history[:6]).ended_early, "one round after its best"
    assert not console.early_end(settings, forked.history[:6]) and console.early_end(settings, forked.history)
    assert forked.chosen and forked.chosen["round"] == 5 and "best.h5 holds round 5" in result.out
    assert peer_section._measured(forked) == [row["accuracy"]["weighted"] for row in forked.history[4:]]


def test_best_round_of_a_fork_is_one_of_its_own(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    """Its head begins anew and does not learn, so that no round is as good as those of the run before it."""
    (tmp_path / "second.py").write_text(OWN)
    own = ("--algorithm", "second.py", "--train.lr", "1e-9", "--eval.every", "1", "--run.dir", "own")
    result = run_command("fork", run, "--at", "2", *own, "--rounds", "4")
    rows = load_run(tmp_path / "own").history
    assert rows[1]["accuracy"]["mean"] > max(row["accuracy"]["mean"] for row in rows[2:])
    assert "best on test: round 3" in result.out and "best.h5 holds round 3" in result.out
    run_command("restart", "own", "--rounds", "5", "--run.dir", "moved")
    for name in ("own", "moved"):
        with Checkpoint(tmp_path / name / "checkpoints" / "best.h5") as best:
            assert best.round > 2
        forked = replace(load_run(tmp_path / name), select="test")
        assert forked.forked == 2 and forked.selected["round"] > 2
        inspected = run_command("inspect", f"{name}/checkpoints/round-000004.h5").out
        assert "best on test: round 3" in inspected
