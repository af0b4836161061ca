"""Ranks that were started with other settings, or run other source files, are refused before any work."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from pfedmoe_mpi.mpi import alike
from support.launcher import Result, error_message, run_program
from support.paths import ROOT

PROGRAM = (sys.executable, "-m", "pfedmoe_mpi")


def unlike(first: tuple[str, ...], other: tuple[str, ...], folder: Path) -> Result:
    """Return the result of `mpirun -n 1 PROGRAM FIRST : -n 1 PROGRAM OTHER`."""
    return run_program(1, *first, ":", "-n", "1", *PROGRAM, *other, cwd=folder, timeout=60)


@pytest.mark.parametrize(
    ("pattern", "flags"),
    [
        (r"rank 1: train\.lr_shared = 0\.5, on rank 0 0\.\d+\n", ("--train.lr_shared", "0.5")),
        (r"rank 1: algorithm = fedavg, on rank 0 pfedmoe; ", ("--algorithm", "fedavg", "--rounds", "3")),
    ],
)
def test_other_settings_on_one_rank_are_refused(
    small_run: tuple[str, ...], tmp_path: Path, pattern: str, flags: tuple[str, ...]
) -> None:
    common = (*small_run, "--run.dir", "new")
    message = error_message(unlike(common, (*common, *flags), tmp_path), pattern)
    assert "start every rank with the same arguments" in message and not list(tmp_path.iterdir())


def test_other_commands_on_one_rank_are_refused(run: Path, tmp_path: Path) -> None:
    best = str(run / "checkpoints" / "best.h5")
    for first, other, pattern in (
        (("evaluate", best), ("evaluate", best, "--eval.batch", "7"), r"eval\.batch = 7, on rank 0 nothing"),
        (("restart", "run"), ("check",), "command = check, on rank 0 restart"),
    ):
        error_message(unlike(first, other, tmp_path), pattern)


def test_other_table_on_one_rank_is_refused(tmp_path: Path) -> None:
    """Its floor and the settings that it scales decide the rounds, as its base and its axes do."""
    for floor in ("2", "3"):
        (tmp_path / floor).mkdir()
        text = f'floor = {floor}\nin_rounds = ["fedkd.ramp"]\n[base]\nrounds = 4\n'
        (tmp_path / floor / "t.toml").write_text(text)
    flags = ("--scale", "0.1", "--out", "out")
    first, other = (("reproduce", f"{floor}/t.toml", *flags) for floor in ("2", "3"))
    error_message(unlike(first, other, tmp_path), r"rank 1: table\.floor = 3, on rank 0 2\n")
    assert not (tmp_path / "out").exists()


def test_other_source_file_on_one_rank_is_refused(small_run: tuple[str, ...], tmp_path: Path) -> None:
    """Rank 1 runs a copy of the program in which one line of one file was changed."""
    copy, site, work = tmp_path / "copy", tmp_path / "site", tmp_path / "work"
    shutil.copytree(ROOT / "pfedmoe_mpi", copy / "pfedmoe_mpi")
    loop = copy / "pfedmoe_mpi" / "federation" / "loop.py"
    loop.write_text(loop.read_text() + "# an older version\n")
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        f"import os, sys\nif os.environ.get('PMI_RANK') == '1':\n    sys.path.insert(0, {str(copy)!r})\n"
    )
    work.mkdir()
    env = {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    flags = (*small_run, "--run.dir", "new")
    message = error_message(
        run_program(2, *flags, cwd=work, env=env, timeout=60),
        r"not started alike\nrank 1: pfedmoe_mpi/federation/loop\.py differs from rank 0's\n",
    )
    assert "update the program on every host" in message and not list(work.iterdir())


def test_difference_groups_ranks_and_names_missing_files(tmp_path: Path) -> None:
    package = tmp_path / "pfedmoe_mpi"
    package.mkdir()
    (package / "a.py").write_text("")
    first = alike.facts({"rounds": 1}, package)
    (package / "b.py").write_text("")
    other = alike.facts({"rounds": 1}, package)
    assert alike.digest(first) != alike.digest(other) and alike.digest(first) == alike.digest(dict(first))
    text = alike.difference([first, other, first, other]).problem
    assert text.splitlines()[1:] == ["ranks 1, 3: pfedmoe_mpi/b.py does not exist on rank 0"]
    assert "ranks 1: " not in alike.difference([other, first]).problem
    assert "rank 1: pfedmoe_mpi/b.py is missing" in alike.difference([other, first]).problem
