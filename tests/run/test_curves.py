"""TensorBoard's events, read back with TensorBoard's own reader."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support import launcher
from support.launcher import SMALL_RUN

FLAGS = (*SMALL_RUN, "--rounds", "4", "--eval.every", "2", "--run.checkpoint_every", "2")


@pytest.fixture
def watched(session: launcher.Session, tmp_path: Path) -> Path:
    result = session(*FLAGS, "--run.tensorboard", "true", "--run.dir", "run", cwd=tmp_path)
    assert result.code == 0, result.err
    return tmp_path / "run"


def points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (round, value) of every curve, as TensorBoard reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def check(run: Path) -> None:
    """Check that every round appears once with the values of metrics.jsonl; null has no point."""
    curves, rows = points(run), launcher.read_metrics(run)
    for name in ("accuracy/mean", "accuracy/worst", "accuracy_cohort/mean", "train_loss", "seconds/total"):
        group, _, key = name.partition("/")
        values = [(row["round"], row[group][key] if key else row[group]) for row in rows]
        expected = [(round, pytest.approx(value, rel=1e-6)) for round, value in values if value is not None]
        if group != "seconds":
            assert curves[name] == expected, name
        else:
            assert [round for round, _ in curves[name]] == [row["round"] for row in rows]
    assert [round for round, _ in curves["accuracy/mean"]] == [n for n in (2, 4, 6) if n <= len(rows)]
    assert curves["bytes/up"][0][1] == pytest.approx(rows[0]["bytes"]["up"])


def test_curves_equal_the_metrics_and_change_nothing(
    watched: Path, session: launcher.Session, tmp_path: Path
) -> None:
    check(watched)
    plain = session(*FLAGS, "--run.dir", "plain", cwd=tmp_path)
    assert plain.code == 0 and not (tmp_path / "plain" / "tensorboard").exists()
    assert launcher.reproducible_rows(watched) == launcher.reproducible_rows(tmp_path / "plain")
    assert launcher.checkpoint_digest(watched, 4) == launcher.checkpoint_digest(tmp_path / "plain", 4)


def test_restart_continues_curves_without_gap_or_duplicate(watched: Path, session: launcher.Session) -> None:
    """The restart is from round 2, though the events already hold rounds 3 and 4."""
    (watched / "checkpoints" / "round-000004.h5").unlink()
    result = session("restart", str(watched), "--rounds", "6", cwd=watched.parent)
    assert result.code == 0 and [row["round"] for row in launcher.read_metrics(watched)] == [1, 2, 3, 4, 5, 6]
    check(watched)
    for path in (watched / "tensorboard").iterdir():
        path.unlink()  # lost with a disk, say
    again = session("restart", str(watched), "--rounds", "7", cwd=watched.parent)
    assert again.code == 0
    assert [round for round, _ in points(watched)["train_loss"]] == [1, 2, 3, 4, 5, 6, 7]


def test_failing_curve_writer_does_not_end_the_run(watched: Path, session: launcher.Session) -> None:
    for path in (watched / "tensorboard").iterdir():
        path.unlink()
    (watched / "tensorboard").rmdir()
    (watched / "tensorboard").write_text("in the way")
    result = session("restart", str(watched), "--rounds", "6", cwd=watched.parent)
    assert result.code == 0 and len(launcher.read_metrics(watched)) == 6
    assert result.err.count("no more TensorBoard curves") == 1


def test_missing_tensorboard_is_reported_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['tensorboard'] = None\n")
    here = os.environ.get("PYTHONPATH", "")
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{here}" if here else str(tmp_path)}
    flags = (*SMALL_RUN, "--run.tensorboard", "true", "--run.dir", "run")
    result = launcher.run_program(2, *flags, cwd=tmp_path, env=env)
    launcher.error_message(result, r"pip install 'pfedmoe_mpi\[tensorboard\]'")
    assert not (tmp_path / "run").exists()
