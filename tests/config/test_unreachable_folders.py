"""Folders of which the system says nothing: one message, where `Path.exists` raises an error."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.names import check_reachable
from support.launcher import SMALL_RUN, error_message, run_program

LONG = "a" * 300  # more than a name can have: the error is of the same kind as without permission


@pytest.mark.parametrize(
    "arguments",
    [
        [*SMALL_RUN, "--run.dir", LONG],
        ["restart", LONG],
        ["restart", "run", "--run.dir", LONG],
        ["fork", LONG, "--at", "1", "--seed", "1"],
        ["fork", "run", "--at", "2", "--train.lr", "0.1", "--run.dir", LONG],
        ["verify", LONG],
        ["report", LONG],
        ["report", "run", "--out", LONG],
        ["reproduce", "t.toml", "--out", LONG],
    ],
)
def test_unreachable_folder_is_refused(
    assert_refused: Callable[..., str], run: Path, tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "t.toml").write_text("[base]\nrounds = 1\n[axis]\nseed = [0]\n", encoding="utf-8")
    assert_refused("aaa.* cannot be reached: File name too long", *arguments)


@pytest.mark.parametrize(
    ("pattern", "arguments"),
    [
        ("there is no file", [*SMALL_RUN, "--model.weights", f"{LONG}.pth"]),
        ("there is no file", ["--algorithm", f"./{LONG}.py"]),
        ("cannot be read as TOML", ["run", f"{LONG}.toml"]),
        ("run.scratch = .* is missing", [*SMALL_RUN, "--run.scratch", LONG]),
        ("there is no folder", ["export", "run/checkpoints/best.h5", f"{LONG}/c.h5", "--client", "0"]),
        ("there is no folder", ["pack", "run/checkpoints/best.h5", f"{LONG}/c.h5"]),
        ("there is no folder", ["weights", "fetch", "resnet18", "--out", LONG]),
    ],
)
def test_unreachable_file_is_refused(
    assert_refused: Callable[..., str], run: Path, pattern: str, arguments: list[str]
) -> None:
    assert_refused(pattern, *arguments)


def test_unreachable_folder_is_refused_once_under_mpi(tmp_path: Path) -> None:
    error_message(run_program(2, "restart", LONG, cwd=tmp_path), "cannot be reached: File name too long")


def test_folder_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o600)
    user = os.geteuid()
    os.seteuid(user or 65534)  # the superuser may enter every folder
    try:
        for folder in (tmp_path / "closed", tmp_path / "closed" / "run"):
            with pytest.raises(ConfigError, match="cannot be reached: Permission denied"):
                check_reachable(folder, ConfigError)
    finally:
        os.seteuid(user)


def test_missing_folders_and_files_are_reachable(tmp_path: Path) -> None:
    """Whoever needs a folder says so."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "none", tmp_path / "file", tmp_path / "file" / "below"):
        check_reachable(path, ConfigError)
