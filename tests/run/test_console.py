"""The progress bar of rank 0 on a pseudo-terminal of 80 columns."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pfedmoe_mpi.run import console
from support import launcher


def test_long_rounds_without_a_terminal_get_a_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 30.0, 61.0, 62.0, 100.0, 125.0, 126.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    progress = console.Progress(rounds=9, done=2, clients=5)
    for done in range(1, 5):
        progress.client_trained(3, done, 5)
    lines = ["round 3/9  rank 0: 2 of 5 clients", "round 3/9  rank 0: 4 of 5 clients"]
    assert capsys.readouterr().out.splitlines() == lines


def test_equal_ranks_share_a_line() -> None:
    device_lines = [
        "a, 2 clients",
        "a, 1 clients",
        "a, 1 clients",
        "b, 1 clients",
        "b, 1 clients",
        "b, 1 clients",
    ]
    assert list(console._rank_lines(device_lines)) == [
        *("rank 0: a, 2 clients", "rank 1: a, 1 clients", "rank 2: a, 1 clients"),
        "ranks 3 to 5, each: b, 1 clients",
    ]


def on_a_terminal(*arguments: str, cwd: Path, timeout: float = 120) -> str:
    """Return what the program without a launcher writes to a terminal."""
    ours, theirs = pty.openpty()
    environment = {**launcher.clean_environment("mpich", {}), "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(
        [sys.executable, "-m", "pfedmoe_mpi", *arguments],
        cwd=cwd,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    written, deadline = b"", time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 1.0)[0]:
                try:
                    piece = os.read(ours, 65536)
                except OSError:  # the other side is closed
                    break
                written += piece
        assert process.wait(10) == 0, written.decode()
    finally:
        launcher.kill_tree(process.pid)
        os.close(ours)
    return written.decode()


def test_bar_shows_rounds_accuracy_clients_and_time_left(tmp_path: Path, small_run: tuple[str, ...]) -> None:
    long = ("--rounds", "12", "--eval.every", "11", "--train.epochs", "10", "--run.dir", "run")
    written = on_a_terminal(*small_run, *long, cwd=tmp_path)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)
    bars = [line for line in re.split(r"[\r\n]+", plain) if line.startswith("round ")]
    assert re.search(r"12/12 .* accuracy \d+\.\d\d %, 4 clients here +\d:\d\d:\d\d", bars[-1]), bars[-1]
    within = [
        bar for bar in bars if re.search(r"11/12 .* accuracy \d+\.\d\d %, rank 0: \d of 4 clients", bar)
    ]
    assert within, "nothing moves within a round"
    assert all(len(bar.rstrip()) <= 80 and "…" not in bar for bar in bars)
    logged = (tmp_path / "run" / "log" / "rank-0000.txt").read_text()
    lines = re.findall(r"round \d+/12 .*", logged)
    assert len(lines) == 12, "one plain line per round in the log"
    assert re.search(r"accuracy \d.*  cohort, before the sum \d.*  loss \d.* s, 0:00:\d\d left", lines[10])
    assert re.fullmatch(r"round 2/12  loss \d.* left", lines[1]), "what was not measured is not spoken of"


def test_tables_of_many_clients_have_the_worst_the_median_and_the_best() -> None:
    assert console.worst_median_best([0.5, None, 0.25, 1.0, 0.75]) == [2, 0, 3]
    assert console.worst_median_best([0.5, 0.5]) == [0, 1] and console.worst_median_best([None, 1.0]) == [1]
    assert console.worst_median_best([None] * 50) == []


@pytest.mark.parametrize(
    ("mean", "tuned", "line"),
    [
        (0.5, None, "unseen clients: accuracy mean 50.00 %"),
        (None, 0.75, "unseen clients: accuracy mean after tuning 75.00 %"),
        (0.5, 0.75, "unseen clients: accuracy mean 50.00 %, after tuning 75.00 %"),
        (None, None, ""),
    ],
)
def test_unseen_clients_have_the_accuracies_that_were_measured(
    mean: float | None, tuned: float | None, line: str
) -> None:
    row = {"accuracy_unseen": {"mean": mean}, "accuracy_tuned": {"mean": tuned}}
    assert console.unseen_line(row) == line
