"""A byte order mark, as Windows editors write it, at the start of every kind of text file that is read."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path

from pfedmoe_mpi import load_run
from support.data_files import open_data
from support.launcher import Result
from support.text_files import write_hospitals, write_news, write_stories

CONFIG = 'rounds = 1\nclients = 4\ndata.source = "synthetic"\ndata.samples = 200\ndata.size = 8\n'
TABLE = f'title = "A table"\n[base]\n{CONFIG}[axis]\nseed = [0, 1]\n'


def mark(*paths: Path) -> None:
    for path in paths:
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())


def test_configurations_and_tables_are_read(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    config, table = tmp_path / "c.toml", tmp_path / "t.toml"
    config.write_text(CONFIG, encoding="utf-8")
    table.write_text(TABLE, encoding="utf-8")
    mark(config, table, run / "config.toml")
    assert "synthetic: 4 clients, cohort 4, 1 rounds" in run_command(config, "--dry").out
    assert run_command("reproduce", table, "--list").out.split() == ["seed0", "seed1"]
    run_command("report", run, "--text")


def test_run_without_a_checkpoint_is_restarted(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    mark(run / "config.toml")
    run_command("restart", run, "--rounds", "3")
    assert [row["round"] for row in load_run(run).rows] == [1, 2, 3]


def test_data_files_are_read(tmp_path: Path) -> None:
    hospitals, stories = write_hospitals(tmp_path / "h"), write_stories(tmp_path / "s")
    news = write_news(tmp_path / "news.csv")
    sources = [("text", news), ("heart", hospitals), ("words", stories)]
    before = [open_data(source, path).class_names for source, path in sources]
    mark(*(path for path in tmp_path.rglob("*") if path.is_file()))
    assert [open_data(source, path).class_names for source, path in sources] == before
