"""Fixtures of all tests: the program as a process, and runs that several tests read."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

# Before torch is imported: several tests at once with a thread per core each wait for each other's threads.
os.environ["OMP_NUM_THREADS"] = "1"

pytest.register_assert_rewrite("support")  # before its import: its assertions show their values too

from support import launcher  # noqa: E402
from support.files import path_digest  # noqa: E402
from support.launcher import SMALL_RUN  # noqa: E402

LONG_FOLDERS = ("run", "jobs")

# A shell's background job ignores Ctrl-C, and so would the programs that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the long folders first, so that parallel workers end at about the same time."""
    items.sort(key=lambda item: item.path.parent.name not in LONG_FOLDERS)


@pytest.fixture(scope="session")
def small_run() -> tuple[str, ...]:
    """Flags of a run of one round that takes less time than starting the program."""
    return SMALL_RUN


@pytest.fixture(scope="session")
def session() -> launcher.Session:
    """Run command lines in one process without a launcher: `session("inspect", "x.h5", cwd=folder)`."""
    return launcher.shared_session(1)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three rounds on two ranks, measured every second round and saved every round."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ("--rounds", "3", "--eval.every", "2", "--run.checkpoint_every", "1", "--run.dir", "run")
    result = launcher.shared_session(2)(*SMALL_RUN, *flags, cwd=folder)
    assert result.code == 0, result.err
    (folder / "run" / "said.txt").write_text(result.out)
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained` that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def assert_refused(session: launcher.Session, tmp_path: Path) -> Callable[..., str]:
    """Return a check that a command line is refused and writes nothing; the check returns the message."""

    def check(pattern: str, *arguments: str | Path) -> str:
        before = path_digest(tmp_path), sorted(tmp_path.rglob("*"))
        result = session(*map(str, arguments), cwd=tmp_path)
        assert (path_digest(tmp_path), sorted(tmp_path.rglob("*"))) == before, "something was written"
        return launcher.error_message(result, pattern)

    return check


@pytest.fixture
def run_command(session: launcher.Session, tmp_path: Path) -> Callable[..., launcher.Result]:
    """Return a function that runs a command line in `tmp_path`; it must exit with 0."""

    def check(*arguments: str | Path) -> launcher.Result:
        result = session(*map(str, arguments), cwd=tmp_path)
        assert result.code == 0, result.err
        return result

    return check
