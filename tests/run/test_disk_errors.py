"""Disks that are full, read-only, failing or removed during a run, and two runs in one folder."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.run.folder import RunFolder
from pfedmoe_mpi.storage.lock import Lock
from support import launcher
from support.launcher import (
    SMALL_RUN,
    checkpoint_digest,
    error_message,
    read_events,
    read_metrics,
    run_to_end,
    running_job,
    wait_for_file,
)
from support.paths import TESTS

# Rounds of about half a second, each with a checkpoint.
LONG = (*SMALL_RUN, "--run.checkpoint_every", "1", "--train.epochs", "60", "--rounds", "8")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of LONG."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_to_end(2, *LONG, "--run.dir", "run", cwd=folder)
    return checkpoint_digest(folder / "run", 8)


class JobOutput:
    """A job's stderr, read while it runs."""

    def __init__(self, job: subprocess.Popen[str]) -> None:
        self.text = ""
        self._job = job
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self._job.stderr
        for line in self._job.stderr:
            self.text += line

    def wait(self, words: str, times: int = 1, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while self.text.count(words) < times:
            assert time.monotonic() < deadline, f"never said '{words}': {self.text}"
            assert self._job.poll() is None, self.text
            time.sleep(0.01)

    def ended(self, timeout: float = 90) -> int:
        """The exit code."""
        code = self._job.wait(timeout)
        self._thread.join(10)
        return code


def command(*arguments: str, cwd: Path) -> None:
    subprocess.run(arguments, cwd=cwd, check=True, timeout=30, capture_output=True)


def as_root() -> None:
    if os.geteuid() == 0:
        return
    if os.environ.get("CI") == "true":
        pytest.fail("mounting needs root")
    pytest.skip("mounting needs root")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 60 MB."""
    as_root()
    folder = tmp_path / "disk"
    folder.mkdir()
    command("mount", "-t", "tmpfs", "-o", "size=60m", "none", str(folder), cwd=tmp_path)
    yield folder
    command("umount", "--lazy", str(folder), cwd=tmp_path)


def fill(disk: Path) -> Path:
    """Fill all free space."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            return filler


def test_full_disk_is_reported_and_writing_is_retried(disk: Path, undisturbed: str) -> None:
    with running_job(2, *LONG, "--run.dir", "run", cwd=disk) as job:
        output = JobOutput(job)
        wait_for_file(disk / "run" / "metrics.jsonl", job)
        filler = fill(disk)
        output.wait("cannot be written")
        filler.unlink()
        assert output.ended() == 0, output.text
    assert "No space left on device" in output.text and "Traceback" not in output.text
    assert checkpoint_digest(disk / "run", 8) == undisturbed
    assert [row["round"] for row in read_metrics(disk / "run")] == list(range(1, 9)), (
        "rows missed are added later"
    )
    assert not list((disk / "run" / "checkpoints").glob(".*")), "nothing half-written"


def test_disk_that_stays_full_ends_the_run(disk: Path, undisturbed: str) -> None:
    with running_job(2, *LONG, "--run.dir", "run", cwd=disk) as job:
        output = JobOutput(job)
        wait_for_file(disk / "run" / "metrics.jsonl", job)
        filler = fill(disk)
        assert output.ended() == 1, output.text
    assert output.text.count("cannot be written: ") == 3 and "Traceback" not in output.text
    assert output.text.count("error: the run ends") == 1 and "remedy: fix" in output.text
    left = checkpoint.newest_first(disk / "run" / "checkpoints")
    assert left
    for path in left:
        checkpoint.verify(path)
    filler.unlink()
    run_to_end(3, "restart", "run", cwd=disk)
    assert checkpoint_digest(disk / "run", 8) == undisturbed


def test_fork_without_a_checkpoint_of_its_own_ends(
    disk: Path, run: Path, session: launcher.Session, tmp_path: Path
) -> None:
    """A restart of it would begin at round 1; its checkpoints are on a disk that is full."""
    (disk / "checkpoints").mkdir()
    (tmp_path / "fork").mkdir()
    (tmp_path / "fork" / "checkpoints").symlink_to(disk / "checkpoints")
    fill(disk)
    flags = ("fork", str(run), "--at", "2", "--train.lr", "0.01", "--run.dir", "fork")
    result = session(*flags, cwd=tmp_path)
    assert result.code == 1 and "its first checkpoint cannot be written" in result.err, result.err
    assert not (tmp_path / "fork" / "config.toml").exists()
    assert session(*flags, "--run.force", "true", cwd=tmp_path).code == 0


def test_read_only_checkpoints_end_the_run(tmp_path: Path, undisturbed: str) -> None:
    as_root()
    folder = tmp_path / "run" / "checkpoints"
    with running_job(2, *LONG, "--run.dir", "run", cwd=tmp_path) as job:
        output = JobOutput(job)
        wait_for_file(tmp_path / "run" / "metrics.jsonl", job)
        command("mount", "--bind", str(folder), str(folder), cwd=tmp_path)
        try:
            while subprocess.run(
                ["mount", "-o", "remount,bind,ro", folder], check=False, timeout=30
            ).returncode:
                time.sleep(0.01)  # busy: a checkpoint is being written
            output.wait("Read-only file system")
            assert output.ended() == 1, output.text
        finally:
            command("umount", "--lazy", str(folder), cwd=tmp_path)
    assert "3 in a row" in output.text and "Traceback" not in output.text
    assert [event["event"] for event in read_events(tmp_path / "run")][-1] == "error"
    run_to_end(1, "restart", "run", cwd=tmp_path)
    assert checkpoint_digest(tmp_path / "run", 8) == undisturbed


def test_removed_run_folder_ends_the_run(tmp_path: Path) -> None:
    with running_job(2, *LONG, "--run.dir", "run", cwd=tmp_path) as job:
        output = JobOutput(job)
        wait_for_file(tmp_path / "run" / "metrics.jsonl", job)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert output.ended() == 1, output.text
    assert output.text.count("cannot be written: ") == 3 and "Traceback" not in output.text
    assert "metrics.jsonl cannot be kept up to date" in output.text


# A file system that refuses single ranks


@pytest.fixture(scope="module")
def failing_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library compiled from `support/failing_disk.c`."""
    if not shutil.which("cc"):
        pytest.fail("no C compiler") if os.environ.get("CI") == "true" else pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("failing_disk")
    source = TESTS / "support" / "failing_disk.c"
    command("cc", "-shared", "-fPIC", "-o", "failing_disk.so", str(source), "-ldl", cwd=folder)
    return folder / "failing_disk.so"


@pytest.mark.parametrize(("number", "rank"), [(errno.EDQUOT, 1), (errno.EIO, 0), (errno.ENOSPC, -1)])
def test_refused_writes_are_reported_and_retried(
    tmp_path: Path, failing_disk: Path, undisturbed: str, number: int, rank: int
) -> None:
    """A quota on one host, a failing fsync, a full server: the reason is reported, then writing succeeds."""
    flag = tmp_path / "refuse"
    shim = {"LD_PRELOAD": str(failing_disk), "REFUSE": str(flag)}
    job = launcher.start_program(2, *LONG, "--run.dir", "run", cwd=tmp_path, env=shim)
    try:
        output = JobOutput(job)
        wait_for_file(tmp_path / "run" / "metrics.jsonl", job)
        flag.write_text(f"{number} {rank}")
        output.wait("cannot be written: ")
        flag.unlink()
        assert output.ended() == 0, output.text
    finally:
        launcher.kill_tree(job.pid)
    assert os.strerror(number) in output.text and "Traceback" not in output.text
    assert checkpoint_digest(tmp_path / "run", 8) == undisturbed
    assert any(event["event"] == "not written" for event in read_events(tmp_path / "run"))


# Two runs in one folder


def test_copy_of_the_best_checkpoint_leaves_no_half_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without hard links best.h5 is a copy."""
    folder = RunFolder(tmp_path / "run")
    folder.create(False, "rounds = 1\n")
    written = folder.checkpoints / "round-000001.h5"
    written.write_bytes(b"whole")

    def refused(*_: Path) -> None:
        raise OSError(errno.EPERM, "no hard links")

    def half(_: Path, to: Path) -> None:
        to.write_bytes(b"who")
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "link", refused)
    folder.mark_best(written)
    monkeypatch.setattr(shutil, "copyfile", half)
    with pytest.raises(OSError, match="no space"):
        folder.mark_best(written)
    folder.unlock()
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["best.h5", "round-000001.h5"]
    assert folder.best.read_bytes() == b"whole"


def test_second_run_in_a_folder_is_refused(tmp_path: Path) -> None:
    endless = (*LONG, "--rounds", "5000", "--run.dir", "run")
    with running_job(2, *endless, cwd=tmp_path) as job:
        wait_for_file(tmp_path / "run" / "metrics.jsonl", job)
        force = launcher.run_program(1, *endless, "--run.force", "true", cwd=tmp_path)
        again = launcher.run_program(2, "restart", "run", cwd=tmp_path)
        seen = len(read_metrics(tmp_path / "run"))
        job.send_signal(signal.SIGUSR1)
        assert launcher.wait_for_end(job, 60).code == 75
    for second in (force, again):
        error_message(second, r"the run folder .*run is in use: process \d+ on ")
    assert [row["round"] for row in read_metrics(tmp_path / "run")][:seen] == list(range(1, seen + 1))
    assert [event["event"] for event in read_events(tmp_path / "run")] == ["start", "stop"]


def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    holder = "import sys, time; from pathlib import Path; from pfedmoe_mpi.storage.lock import Lock; "
    holder += "held = Lock(Path('lock'), 0.0); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", holder], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )

    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError):
            Lock(tmp_path / "lock", 0.3)
        process.kill()
        Lock(tmp_path / "lock", 10.0).release()
    finally:
        process.kill()
        process.communicate()
