"""Lines of events.jsonl and metrics.jsonl that no killed run leaves: one message, or a rewritten file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pfedmoe_mpi.storage import untrusted_json
from support.launcher import Result, read_metrics, reproducible_rows

DEEP = b"[" * 200_000
DAMAGE = [
    (b'{"event": []}', "line 2 is not an event"),
    (b'{"event": "stop", "round": []}', "line 2 is not an event"),
    (b"[1]", "line 2 is not an event"),
    (DEEP, "line 2 is not JSON: maximum recursion"),
    (b'{"event": "st\xf6p"}', "line 2 is not UTF-8"),
    (b'{"event": "stop", "round": 1e999}', "line 2 is not JSON: the number 1e999"),
]


@pytest.mark.parametrize(("line", "pattern"), DAMAGE)
def test_damaged_events_are_refused_with_one_message(
    assert_refused: Callable[..., str], run: Path, line: bytes, pattern: str
) -> None:
    path = run / "events.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + b"".join(rest))
    for command in (("restart", run, "--rounds", "4"), ("report", run, "--text", "true"), ("report", run)):
        assert f"mv {path} {path}.1" in assert_refused(pattern, *command)


@pytest.mark.parametrize("line", [b'{"round": []}', DEEP, b"\xff", b"[]"])
def test_damaged_metrics_are_refused_by_reports_and_rewritten_by_restart(
    assert_refused: Callable[..., str], run_command: Callable[..., Result], run: Path, line: bytes
) -> None:
    kept, path = reproducible_rows(run), run / "metrics.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + b"".join(rest))
    assert "restart" in assert_refused("line 2", "report", run, "--text", "true")
    (numbers,) = (run / "measured").iterdir()
    numbers.write_bytes(numbers.read_bytes()[:2000])
    run_command("restart", run)
    assert reproducible_rows(run) == kept and len(read_metrics(run)) == 3


def test_half_lines_of_killed_runs_are_left_out(run_command: Callable[..., Result], run: Path) -> None:
    events, metrics = run / "events.jsonl", run / "metrics.jsonl"
    first, *rest = events.read_bytes().splitlines(keepends=True)
    events.write_bytes(first + first[:50] + b"\n" + b"\0" * 40 + b"\n" + b"".join(rest) + first[:50])
    metrics.write_bytes(metrics.read_bytes() + b'{"round": 4, "acc')
    assert "round" in run_command("report", run, "--text", "true").out
    run_command("restart", run, "--rounds", "4")
    assert [row["round"] for row in read_metrics(run)] == [1, 2, 3, 4]
    assert [event["event"] for event in untrusted_json.read_events(events)] == [
        "start",
        "finish",
        "restart",
        "finish",
    ]


@pytest.mark.parametrize("text", ["a = " + "[" * 200_000, 'a = "\udcff"'])
def test_damaged_toml_is_refused(
    assert_refused: Callable[..., str], run: Path, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert_refused("cannot be read as TOML", "run", path)
    assert_refused("cannot read .* as TOML", "reproduce", path, "--list", "true")
    path.rename(run / "config.toml")
    assert_refused("config.toml", "report", run, "--text", "true")
