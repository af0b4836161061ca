"""Files that are complete under their name or absent, and temporary files that do not stay."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pfedmoe_mpi.storage import durable


def refuse(*_: object) -> None:
    raise OSError("refused")


def write_new(path: Path, *, error: type[BaseException] | None = None, other: str = "") -> None:
    """Write a new file, and within it raise an error or let another process write the file first."""
    with durable.new_file(path) as temporary:
        temporary.write_text("text")
        if other:
            path.write_text(other, encoding="utf-8")
        if error:
            raise error


def test_text_replaces_a_file_and_what_a_killed_process_left(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("old")
    pid = os.fork()
    if not pid:  # die as by kill -9, with the temporary file written
        durable.publish = lambda *_: os._exit(9)  # type: ignore[assignment]
        durable.write_text(path, "a longer text of the killed process")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert len(list(tmp_path.iterdir())) == 2 and path.read_text() == "old"
    durable.write_text(path, "new")
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "new"


def test_text_that_cannot_be_written_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.toml"
    durable.write_text(path, "old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="refused"):
        durable.write_text(path, "new")
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "old"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exception_removes_the_temporary_file(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write_new(tmp_path / "out.h5", error=error)
    assert list(tmp_path.iterdir()) == []


def test_new_file_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    with pytest.raises(FileExistsError):
        write_new(path, other="first")
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "first"
    path.unlink()
    write_new(path)
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "text"
