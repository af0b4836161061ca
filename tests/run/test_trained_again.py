"""A restart says which rounds it trains again, because no checkpoint holds them, and keeps their rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from support.launcher import Result, reproducible_rows


def remove_checkpoints(run: Path, first: int) -> None:
    """Remove the checkpoints of this and later rounds, as if the run had been killed before them."""
    (run / "checkpoints" / "best.h5").unlink(missing_ok=True)
    for number in range(first, 4):
        (run / "checkpoints" / f"round-{number:06d}.h5").unlink(missing_ok=True)


def test_rounds_trained_again_are_printed_and_their_rows_kept(
    run_command: Callable[..., Result], run: Path
) -> None:
    """Killed in a round without a checkpoint since round 2, then once more before the first checkpoint."""
    kept, rows = (run / "metrics.jsonl").read_text(), reproducible_rows(run)
    remove_checkpoints(run, 3)
    numbers = (run / "measured" / "000001.h5").read_bytes()
    assert "round 3 is trained again" in run_command("restart", run).out
    assert (run / "measured.1" / "000001.h5").read_bytes() == numbers
    assert (run / "metrics.jsonl.1").read_text() == kept and reproducible_rows(run) == rows
    remove_checkpoints(run, 1)
    again = (run / "metrics.jsonl").read_text()
    result = run_command("restart", run)
    assert "rounds 1 to 3 are trained again" in result.out and "metrics.jsonl.2" in result.out
    assert (run / "metrics.jsonl.2").read_text() == again and (run / "metrics.jsonl.1").read_text() == kept
    assert reproducible_rows(run) == rows
    newest, best = run / "checkpoints" / "round-000003.h5", run / "checkpoints" / "best.h5"
    best.unlink()
    newest.rename(best)
    newest.write_bytes(best.read_bytes()[:-9])
    assert (
        f"note: best.h5 holds round 3: pfedmoe-mpi restart {best} --run.dir NEW"
        in run_command("restart", run).err
    )


def test_half_line_is_not_a_round(run_command: Callable[..., Result], run: Path) -> None:
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"round": 4, "acc')
    assert "trained again" not in run_command("restart", run, "--rounds", "4").out
    assert not (run / "metrics.jsonl.1").exists()


def test_damaged_rows_are_kept(run_command: Callable[..., Result], run: Path) -> None:
    damaged = (run / "metrics.jsonl").read_bytes().replace(b"accuracy", b"\xffccuracy", 1)
    (run / "metrics.jsonl").write_bytes(damaged)
    result = run_command("restart", run, "--rounds", "4")
    assert "metrics.jsonl is damaged: line 1 is not UTF-8" in result.out
    assert (run / "metrics.jsonl.1").read_bytes() == damaged


def test_fewer_rounds_than_trained_are_refused_without_a_checkpoint(
    assert_refused: Callable[..., str], run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    remove_checkpoints(run, 1)
    message = assert_refused("rounds = 2, but the run had trained 3", "restart", run, "--rounds", "2")
    assert "--rounds 3 trains them again" in message and "--run.dir NEW" in message
    run_command("restart", run, "--rounds", "2", "--run.dir", "NEW")
    run_command("restart", run, "--rounds", "3")
    rows = reproducible_rows(run)
    assert len(rows) == 3 and reproducible_rows(tmp_path / "NEW") == rows[:2]
