"""What tests share: the program as a process, and runs that several tests read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import launcher
from support.launcher import SMALL


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Flags of a run of one round that takes less time than its start."""
    return SMALL


@pytest.fixture(scope="session")
def session() -> Iterator[launcher.Session]:
    """Command lines in one process without a launcher: `session("inspect", "x.h5", cwd=folder)`."""
    running = launcher.Session()
    yield running
    running.close()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two ranks, three rounds measured every second and saved each; only to be read."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ("--rounds", "3", "--eval.every", "2", "--run.checkpoint_every", "1", "--run.dir", "run")
    result = launcher.program(2, *SMALL, *flags, cwd=folder)
    assert result.code == 0, result.err
    (folder / "run" / "said.txt").write_text(result.out)
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """`trained`, for a test to change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def refused(session: launcher.Session, tmp_path: Path) -> Callable[..., str]:
    """Runs a command line in `tmp_path`, where nothing may change, and returns its message."""

    def check(pattern: str, *arguments: str | Path) -> str:
        before = launcher.digest(tmp_path), sorted(tmp_path.rglob("*"))
        result = session(*map(str, arguments), cwd=tmp_path)
        assert (launcher.digest(tmp_path), sorted(tmp_path.rglob("*"))) == before, "something was written"
        return launcher.told(result, pattern)

    return check


@pytest.fixture
def done(session: launcher.Session, tmp_path: Path) -> Callable[..., launcher.Result]:
    """Runs a command line in `tmp_path`; it must end well."""

    def check(*arguments: str | Path) -> launcher.Result:
        result = session(*map(str, arguments), cwd=tmp_path)
        assert result.code == 0, result.err
        return result

    return check
