"""A method's file that cannot be used is an error of this method only."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support import launcher
from support.launcher import ROOT, SMALL_RUN

SOURCES = {  # what is in the file, the line that is wrong, and whether Python cannot read the file at all
    "syntax": (b'"""A method."""\n\nx = = 3\n', 3, True),
    "indentation": (b'"""A method."""\n\ndef f():\nreturn 1\n', 4, True),
    "encoding": (b'"""A method."""\nx = "\xff"\n', None, True),
    "null": (b'"""A method."""\nx = 1\0\n', None, True),
    "type": (b'"""A method."""\nclass Options(Section):\n    x: Flot = 1.0\n', 2, False),
    "call": (b'"""A method."""\nclass Options(Section):\n    x: int = Feld(1)\n', 3, False),
    "range": (b'"""A method."""\nclass Options(Section):\n    x: int = Field(0, ge=1)\n', 2, False),
    "required": (b'"""A method."""\nclass Options(Section):\n    x: int\n', 2, False),
    "exit": (b'"""A method."""\nclass Options(Section):\n    raise SystemExit(3)\n', 3, False),
    "help": (b'"""A method."""\nclass Options(Section):\n    x: int = 1\n    (1, 2)\n', 2, False),
    "base": (b'"""A method."""\n\nclass Options:\n    x = 1\n', 3, False),
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the `algorithms` of a copy of the package."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(
        ROOT / "pfedmoe_mpi", folder / "pfedmoe_mpi", ignore=shutil.ignore_patterns("__pycache__")
    )
    return folder / "pfedmoe_mpi" / "algorithms"


def program(package: Path, *words: str, ranks: int = 0) -> launcher.Result:
    return launcher.run_program(ranks, *words, cwd=package.parents[1], env={"COLUMNS": "300"})


@pytest.mark.parametrize("kind", SOURCES)
def test_broken_file_is_named(package: Path, kind: str) -> None:
    content, line, unreadable = SOURCES[kind]
    file = package / "broken.py"
    file.write_bytes(content)
    place = f"{file}:{line}: " if line else f"{file}"
    message = launcher.error_message(
        program(package, "--algorithm", "broken"), "\n  remedy: fix this file, or choose"
    )
    assert place in message, message
    summary = program(package, "--help")
    assert summary.code == 0 and "\n  fedavg " in summary.out
    assert f"\n  broken          {f'cannot be used: {place}' if unreadable else 'A method.'}" in summary.out
    file.unlink()


def test_broken_file_is_named_once_by_several_ranks(package: Path) -> None:
    file = package / "broken.py"
    file.write_bytes(SOURCES["syntax"][0])
    result = program(package, "--algorithm", "broken", ranks=2)
    launcher.error_message(result, rf"{file}:3: .*\n  remedy: fix this file")
    file.unlink()


@pytest.mark.parametrize("kind", ["syntax", "type", "exit", "help"])
def test_settings_beside_a_broken_file(package: Path, kind: str) -> None:
    file = package / "broken.py"
    file.write_bytes(SOURCES[kind][0])
    launcher.error_message(
        program(package, "--broken.x", "3", "--algorithm", "fedavg"), f"{file}:{SOURCES[kind][1]}: "
    )
    settings = program(package, "run", "--help")
    assert settings.code == 0 and "--fedtgp.margin" in settings.out and settings.err == ""
    file.unlink()


def test_missing_file(package: Path) -> None:
    file = package / "broken.py"
    file.symlink_to(package / "nowhere.py")
    message = launcher.error_message(program(package, "--algorithm", "broken"), "No such file")
    assert str(file) in message and f"cannot be used: {file}" in program(package, "--help").out
    file.unlink()


def test_name_of_a_section_is_refused(package: Path) -> None:
    file = package / "train.py"
    file.write_text('"""A method."""\nclass Options(Section):\n    x: int = 1\n')
    launcher.error_message(
        program(package, "--algorithm", "train"), f"{file}: 'train' is the name of a setting or section"
    )
    launcher.error_message(program(package, "--train.lr", "-1"), "train.lr = '-1'")
    file.unlink()


def test_other_methods_train_beside_a_broken_one(package: Path) -> None:
    file = package / "broken.py"
    file.write_bytes(SOURCES["syntax"][0])
    flags = ("--algorithm", "fedavg", "--model.pool", "mlp5", "--run.dir", "run")
    result = program(package, *SMALL_RUN, *flags)
    assert result.code == 0, result.err
    newest = package.parents[1] / "run" / "checkpoints" / "round-000001.h5"
    for words in (("inspect", newest, "--digest"), ("evaluate", newest), ("restart", "run", "--rounds", "2")):
        result = program(package, *map(str, words))
        assert result.code == 0, result.err
    file.unlink()
