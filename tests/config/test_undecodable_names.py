"""Names with bytes that are not UTF-8 are refused before anything is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.names import check_path
from support.data_files import data_error, open_data, write_image_folder
from support.launcher import SMALL_RUN, Session, error_message, run_program

LATIN1 = os.fsdecode(b"caf\xe9")
REFUSED = r"'.*caf.' holds the byte 0xe9, which is not UTF-8\n  remedy: rename it"


@pytest.mark.parametrize(
    "arguments",
    [
        [*SMALL_RUN, "--run.dir", LATIN1],
        [*SMALL_RUN, f"--run.dir={LATIN1}"],
        ["--data.source", "folder", "--data.path", LATIN1],
        ["run", f"./{LATIN1}"],
        ["restart", LATIN1],
        ["evaluate", LATIN1],
        ["inspect", LATIN1],
        ["export", "run/checkpoints/best.h5", LATIN1, "--client", "0"],
        ["data", "prepare", LATIN1],
        ["data", "partition", LATIN1],
        ["reproduce", LATIN1],
        ["reproduce", "t.toml", "--out", LATIN1],
        ["report", LATIN1],
        ["report", "run", "--out", LATIN1],
        ["check", LATIN1],
    ],
)
def test_undecodable_arguments_are_refused(assert_refused: Callable[..., str], arguments: list[str]) -> None:
    assert_refused(REFUSED, *arguments)


def test_undecodable_current_folder_is_refused(session: Session, tmp_path: Path) -> None:
    """It would become a part of run.dir and data.path; commands that only read work there."""
    folder = tmp_path / LATIN1
    folder.mkdir()
    for flags in ([], ["--run.dir", "run"]):
        error_message(session(*SMALL_RUN, *flags, cwd=folder), "holds the byte 0xe9")
    assert not list(folder.iterdir())
    assert session("--help", cwd=folder).code == 0


def test_undecodable_argument_is_refused_once_under_mpi(tmp_path: Path) -> None:
    error_message(run_program(2, *SMALL_RUN, "--run.dir", LATIN1, cwd=tmp_path), "holds the byte 0xe9")


def test_undecodable_class_folder_is_refused(
    tmp_path: Path, session: Session, assert_refused: Callable[..., str]
) -> None:
    """The names of images do not matter."""
    root = write_image_folder(tmp_path / "images", {LATIN1: 2, "tea": 2})
    assert_refused(r"images: the name 'caf.' holds", "--data.source", "folder", "--data.path", "images")
    assert_refused("the name", "data", "prepare", "x.h5", "--data.source", "folder", "--data.path", "images")
    (root / LATIN1).rename(root / "caf\xe9")
    (root / "tea" / "0.png").rename(root / "tea" / f"{LATIN1}.png")
    assert open_data("folder", root).class_names == ("caf\xe9", "tea")
    (tmp_path / "link").symlink_to(root.rename(tmp_path / LATIN1))
    data_error(r"the name 'caf.' holds", "folder", tmp_path / "link")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / f"{LATIN1}.txt").write_text("a b c " * 9, encoding="utf-8")
    data_error(r"the name 'caf.' holds", "words", tmp_path / "words", length=4)


def test_run_folder_renamed_to_undecodable_bytes_is_not_reported(
    session: Session, run: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(run, runs / LATIN1)
    error_message(session("report", "runs", cwd=tmp_path), "the run folder 'runs/caf.' holds the byte")
    assert not (runs / LATIN1 / "report").exists() and not (tmp_path / "report").exists()


def test_paths_in_files_must_be_paths(assert_refused: Callable[..., str], tmp_path: Path) -> None:
    for name in ("data.path", "run.dir", "fedjets.common"):
        (tmp_path / "c.toml").write_text(f'{name} = "a\\u0000b"\n', encoding="utf-8")
        assert_refused(f"{name} = '.*x00b' holds a NUL character", "c.toml")
    (tmp_path / "c.toml").write_text('run.dir = "caf\xe9"\n', encoding="utf-8")
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = run_program(0, "c.toml", *SMALL_RUN, cwd=tmp_path, env=ascii_locale)
    error_message(result, r"cannot be a path, because this locale's encoding is ASCII\n.*PYTHONUTF8=1")
    check_path("run.dir =", "caf\xe9", ConfigError)
