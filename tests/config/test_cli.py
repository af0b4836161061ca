"""The commands from end to end on tiny runs: what they print and what they write."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pfedmoe_mpi import __version__, config
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.config import methods
from pfedmoe_mpi.federation.rebuilt import vectors
from support.launcher import (
    Result,
    Session,
    checkpoint_digest,
    clean_environment,
    error_message,
    read_events,
    read_metrics,
    run_program,
)
from support.paths import ROOT


def keys(value: Any) -> Any:
    """Return the keys of nested objects."""
    return {name: keys(below) for name, below in value.items()} if isinstance(value, Mapping) else None


@pytest.fixture(scope="module", params=methods.names())
def of_each(
    request: pytest.FixtureRequest,
    session: Session,
    small_run: tuple[str, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run of one round of every method with half of the clients; read only."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = ("--algorithm", request.param, "--model.pool", "mlp5", "--participation", "0.5")
    result = session(*small_run, *flags, "--run.dir", "run", cwd=folder)
    assert result.code == 0, result.err
    return folder / "run"


# What is said


def test_version_is_printed(tmp_path: Path) -> None:
    result = run_program(2, "--version", cwd=tmp_path)
    assert (result.code, result.out, result.err) == (0, __version__ + "\n", "")


def test_run_prints_plan_rounds_and_table(trained: Path) -> None:
    text = (trained / "said.txt").read_text()
    before, after = text.split("round 1/3")
    for said in (
        "pfedmoe on synthetic: 4 clients, cohort 4, 3 rounds, sample 3×8×8, 10 classes, d = 500",
        "shared:  shared: 4 tensors, 139,100 parameters",
        "private: model: 6 tensors, 144,110 parameters",
        "(mlp4, 2 clients)",
        "rank 0: ",
        "rank 1: ",
        "memory: ",
    ):
        assert said in before, said
    assert before.count("2 client(s)\n") == 2, "one line per rank with its clients"
    assert "round 2/3" in after and "round 3/3" in after and "accuracy" not in after.split("round 2/3")[0]
    table = after.split("clients after round 3")[1]
    row = read_metrics(trained)[2]
    for client, line in enumerate(line for line in table.splitlines() if line.startswith("│")):
        assert ("mlp5", "mlp4")[client % 2] in line
        assert f"{100 * row['clients']['accuracy'][client]:.2f} %" in line
        assert f" {row['clients']['samples'][client]} " in line
    assert "last  round 3" in table
    assert "α shared" in table and "AUC" not in table
    assert "\nbest on test: round" in table and "\nbest.h5 holds round" in table
    assert ", the best on test with a checkpoint; " in table.splitlines()[-1]
    std = np.std(row["clients"]["accuracy"])
    assert f"population std {100 * std:.2f} %" in table.split("last  round 3")[1].splitlines()[0]


def test_dry_run_prints_the_plan_and_writes_nothing(
    run_command: Callable[..., Result], small_run: tuple[str, ...], tmp_path: Path
) -> None:
    text = run_command(*small_run, "--dry", "true", "--run.dir", "new").out
    assert "4 clients, cohort 4" in text and "memory: " in text and "round 1" not in text
    assert list(tmp_path.iterdir()) == []


# The run folder


def test_run_folder_holds_the_documented_files(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        *("config.toml", "metrics.jsonl", "measured", "events.jsonl", "checkpoints", "log", ".lock"),
        "said.txt",  # the test's own
    }
    assert [path.name for path in sorted((trained / "log").iterdir())] == ["rank-0000.txt", "rank-0001.txt"]
    log = (trained / "log" / "rank-0000.txt").read_text()
    assert [f"round {number}/3" in log for number in (1, 2, 3)] == [
        True
    ] * 3 and "clients after round 3" in log
    names = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert names == ["best.h5", *(f"round-{number:06d}.h5" for number in (2, 3))], "run.keep = 2"


def test_config_toml_is_the_effective_configuration(trained: Path) -> None:
    flat = config.flatten(tomllib.loads((trained / "config.toml").read_text()))
    others = set(methods.names()) - {"pfedmoe"}
    assert set(flat) == {name for name in config.fields() if name.partition(".")[0] not in others}
    assert (flat["rounds"], flat["eval.every"], flat["model.dim"]) == (3, 2, 500)
    assert flat["model.pool"] == ["mlp5", "mlp4"]


def test_auto_is_resolved_in_config_toml(
    run_command: Callable[..., Result], small_run: tuple[str, ...], tmp_path: Path
) -> None:
    auto = ("--model.pool", "auto", "--model.shared", "auto", "--train.threads", "auto", "--run.dir", "run")
    run_command(*small_run, *auto)
    flat = config.flatten(tomllib.loads((tmp_path / "run" / "config.toml").read_text()))
    assert flat["model.pool"] == ["mlp1", "mlp2", "mlp3", "mlp4", "mlp5"] and flat["model.shared"] == "mlp5"
    assert flat["train.threads"] == 1, "OMP_NUM_THREADS of the tests"


def test_default_run_folder_is_named_after_the_algorithm(
    run_command: Callable[..., Result], small_run: tuple[str, ...], tmp_path: Path
) -> None:
    for _ in range(2):
        run_command(*small_run, "--algorithm", "standalone")
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    assert len(names) == 2 and all(name.startswith("standalone-20") for name in names)


def test_metrics_rows_have_the_documented_values(trained: Path) -> None:
    table = read_metrics(trained)
    assert [row["round"] for row in table] == [1, 2, 3]
    assert all(row["cohort"] == [0, 1, 2, 3] and row["train_loss"] > 0 for row in table)
    first, second, third = table
    assert keys(first) == keys(second) == keys(third)
    nothing = {"mean": None, "weighted": None, "std": None, "worst": None}
    assert first["accuracy"] == nothing and first["accuracy_cohort"] == nothing, "measured every second round"
    assert first["clients"]["accuracy"] == [None] * 4
    for row in (second, third):
        accuracy = row["clients"]["accuracy"]
        assert row["accuracy"]["mean"] == pytest.approx(np.mean(accuracy))
        assert row["accuracy"]["std"] == pytest.approx(np.std(accuracy))
        assert row["accuracy"]["worst"] == min(accuracy)
        assert row["accuracy_validation"] == nothing
        assert all(0 < alpha < 1 for alpha in row["clients"]["alpha"])
        assert sum(row["clients"]["samples"]) == 160, "8 : 2"
        assert row["bytes"] == {"up": 4 * 139_100, "down": 4 * 139_100, "once": 0}
        assert row["seconds"]["write"] > 0 and row["seconds"]["total"] > row["seconds"]["train"] > 0
        assert row["rss_mb"] > 50


def test_metrics_keys_are_the_same_for_every_method(of_each: Path, trained: Path) -> None:
    row = read_metrics(of_each)[0]
    assert keys(row) == keys(read_metrics(trained)[0])
    assert len(row["cohort"]) == 2
    measured = [accuracy is not None for accuracy in row["clients"]["accuracy_before"]]
    assert measured == [client in row["cohort"] for client in range(4)], (
        "before the sum: the cohort's members"
    )
    assert None not in row["clients"]["accuracy"], "after it: all clients"
    assert row["accuracy_worst_tenth"] == min(row["clients"]["accuracy"]), "one of four"
    assert row["macro_f1"]["mean"] == pytest.approx(np.mean(row["clients"]["macro_f1"]))


def test_events_record_start_and_end(trained: Path) -> None:
    start, finish = read_events(trained)
    assert (start["event"], finish["event"], finish["round"]) == ("start", "finish", 3)
    assert start["ranks"] == len(start["hosts"]) == 2
    assert {"python", "torch", "numpy", "h5py", "mpi", "device", "threads", "precision", "code"} <= set(start)
    assert start["code"].startswith(__version__)


def test_newest_checkpoints_are_kept(
    run_command: Callable[..., Result], small_run: tuple[str, ...], tmp_path: Path
) -> None:
    flags = ("--rounds", "5", "--run.checkpoint_every", "2", "--run.keep", "2", "--run.dir", "run")
    run_command(*small_run, *flags)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["best.h5", "round-000004.h5", "round-000005.h5"], "every second, and the last"
    saved = [row for row in read_metrics(tmp_path / "run") if row["round"] in {1, 2, 4, 5}]
    best = max(saved, key=lambda row: (row["accuracy"]["mean"], -row["round"]))
    with Checkpoint(tmp_path / "run" / "checkpoints" / "best.h5") as loaded:
        assert loaded.round == best["round"]


def test_validation_rows_choose_the_best_checkpoint_and_the_end(
    run_command: Callable[..., Result],
    session: Session,
    assert_refused: Callable[..., str],
    small_run: tuple[str, ...],
    tmp_path: Path,
) -> None:
    """best.h5 is written when validation improves, and the run ends by `run.patience`, restarted or not."""
    assert_refused("run.patience = 3 waits .* there are none", *small_run, "--run.patience", "3")
    flags = ("--partition.validation", "0.3", "--train.lr", "0.2", "--run.checkpoint_every", "100")
    assert_refused(
        "rounds between measurements, eval.every = 4",
        *small_run,
        *flags,
        "--run.patience",
        "3",
        "--eval.every",
        "4",
    )
    drawn = ("--run.patience", "3", "--eval.clients", "0.5")
    assert_refused("compares rounds, and eval.clients = 0.5", *small_run, *flags, *drawn)
    flags = (*small_run, *flags, "--run.patience", "3", "--rounds")
    said = run_command(*flags, "60", "--run.dir", "run").out
    table = read_metrics(tmp_path / "run")
    best = max(table, key=lambda row: (row["accuracy_validation"]["mean"], -row["round"]))
    assert len(table) == best["round"] + 3 < 60, "the other data or rates of this test would end it in time"
    text = run_command("inspect", tmp_path / "run" / "checkpoints" / "best.h5").out
    assert f"round {best['round']} of 60" in text and f"best on validation: round {best['round']}" in text
    accuracy = f"{100 * best['accuracy']['mean']:.2f} %"
    assert f"\nbest on validation: round {best['round']}, test accuracy mean {accuracy}" in said
    assert f"\nbest.h5 holds round {best['round']}, the best on validation with a checkpoint; " in said
    assert f"\nended after {len(table)} of 60 rounds: none was better on validation for 3 rounds" in said
    run_command(*flags, str(len(table) - 1), "--run.dir", "cut")
    run_command("restart", "cut", "--rounds", "60")
    again = run_command("restart", "cut").out
    assert f"the run is finished: ended after {len(table)} of 60" in again and "--run.patience 0" in again
    ends = [checkpoint_digest(tmp_path / folder, len(table)) for folder in ("run", "cut")]
    assert ends[0] == ends[1]
    error_message(
        session("restart", "cut", "--rounds", "70", cwd=tmp_path),
        "ended after .*, so rounds has no effect(.|\n)*--run.patience 0",
    )
    report = run_command("report", "run", "--text").out
    assert f"accuracy, round {best['round']}, chosen on validation rows: {accuracy}" in report
    assert "validation rows choose best.h5" in report


# Reading checkpoints of every method


def test_export_writes_the_checkpoint_tensors(
    run_command: Callable[..., Result], of_each: Path, tmp_path: Path
) -> None:
    source = of_each / "checkpoints" / "round-000001.h5"
    run_command("export", source, "--client", "3", "out.h5")
    with Checkpoint(source) as loaded, h5py.File(tmp_path / "out.h5") as file:
        own, state = loaded.layout(3), loaded.state_layout
        vector = vectors(loaded)(3)
        expected = {e.name: vector[e.offset :][: e.size].reshape(e.shape) for e in own.entries}
        expected |= {e.name: loaded.state[e.offset :][: e.size].reshape(e.shape) for e in state.entries}
        assert len(expected) == len(own.entries) + len(state.entries) > 0
        for name, tensor in expected.items():
            np.testing.assert_array_equal(file[name.rstrip("/")][()], tensor)
        found: list[str] = []
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
        assert set(found) == {name.rstrip("/") for name in expected}
        assert (file.attrs["client"], file.attrs["round"], file.attrs["architecture"]) == (3, 1, "mlp5")
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5"]


def test_evaluate_prints_a_table(run_command: Callable[..., Result], of_each: Path) -> None:
    lines = run_command("evaluate", of_each / "checkpoints" / "round-000001.h5").out.splitlines()
    row = read_metrics(of_each)[0]
    assert lines[0] == "after round 1"
    for client, line in enumerate(lines[1:5]):
        assert line.split()[:4] == [
            "client",
            str(client),
            "accuracy",
            f"{row['clients']['accuracy'][client]:.4f}",
        ]
    assert lines[5].startswith(f"mean {row['accuracy']['mean']:.4f}")


# Data


def test_prepared_data_give_the_same_run(
    run_command: Callable[..., Result], small_run: tuple[str, ...], tmp_path: Path
) -> None:
    assert (
        "200 samples of 3 × 8 × 8 uint8, 10 classes" in run_command("data", "prepare", "d.h5", *small_run).out
    )
    run_command(*small_run, "--run.dir", "a")
    source = ("--data.source", "hdf5", "--data.path", "d.h5", "--data.size", "0")
    run_command(*small_run, *source, "--partition.kind", "dirichlet", "--run.dir", "b")
    first, second = (
        run_command("inspect", tmp_path / name / "checkpoints" / "best.h5", "--digest").out for name in "ab"
    )
    assert first == second


def test_partition_command_does_not_train(
    run_command: Callable[..., Result], small_run: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text('[partition]\nkind = "iid"\n')
    text = run_command("data", "partition", "c.toml", "p.h5", *small_run).out
    assert text.startswith("client  train valid  test") and text.splitlines()[5:] == ["wrote p.h5"]
    with h5py.File(tmp_path / "p.h5") as file:
        assert file.attrs["kind"] == "iid" and file["train/offsets"][()].tolist() == [0, 40, 80, 120, 160]


def test_ascii_terminal_does_not_end_the_job(small_run: tuple[str, ...], tmp_path: Path) -> None:
    result = run_program(0, *small_run, "--run.dir", "run", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert (result.code, result.err) == (0, "") and "clients after round 1" in result.out
    assert "mlp5" in (tmp_path / "run" / "log" / "rank-0000.txt").read_text(encoding="utf-8")


def test_diverged_run_ends_and_resumes_with_a_smaller_rate(
    session: Session, run_command: Callable[..., Result], small_run: tuple[str, ...], tmp_path: Path
) -> None:
    wild = ("--rounds", "2", "--train.lr", "1e30", "--train.clip", "0", "--run.dir", "run")
    ended = session(*small_run, *wild, cwd=tmp_path)
    assert ended.code == 1 and ended.err.count("error: ") == 1 and "with a lower --train.lr" in ended.err
    assert "left out clients 0, 1, 2, 3" in ended.out and "Traceback" not in ended.err
    assert [event["event"] for event in read_events(tmp_path / "run")] == ["start", "dropped", "error"]
    run_command("restart", "run", "--train.lr", "0.05", "--train.clip", "50")
    assert [row["dropped"] for row in read_metrics(tmp_path / "run")] == [[], []]


def test_overflowing_loss_is_null_in_metrics(
    run_command: Callable[..., Result], small_run: tuple[str, ...], tmp_path: Path
) -> None:
    wild = ("--algorithm", "standalone", "--train.lr", "1e5", "--train.clip", "0", "--run.dir", "run")
    run_command(*small_run, *wild)
    assert None in read_metrics(tmp_path / "run")[0]["clients"]["loss"]
    assert "loss -" in run_command("evaluate", tmp_path / "run" / "checkpoints" / "round-000001.h5").out


@pytest.mark.parametrize(
    "command", [("report", "{}", "--text"), ("inspect", "{}/checkpoints/best.h5"), ("run", "--help")]
)
def test_closed_pipe_exits_with_zero(trained: Path, command: tuple[str, ...]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pfedmoe_mpi", *(word.format(trained) for word in command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment("mpich", {}),
        cwd=ROOT,
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.wait(timeout=60) == 0 and process.stderr.read() == b""
    process.stderr.close()
