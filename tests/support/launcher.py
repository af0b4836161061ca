"""The program as its users start it, and many of its command lines in one process or job."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pfedmoe_mpi.storage import measured
from support.paths import ROOT, with_support

LAUNCHER_PREFIXES = (
    "PMI",
    "OMPI_",
    "PRTE_",
    "SLURM_",
    "MPI4PY_",
    "OMP_",
)  # what a job around the tests may have set

MOST_SHARED = 3  # ranks of a job that waits for command lines: more would be a burden on two cores

SMALL_RUN = (
    *("--data.source", "synthetic", "--data.samples", "200", "--data.size", "8", "--clients", "4"),
    *("--model.pool", "mlp5,mlp4", "--model.shared", "mlp5", "--rounds", "1", "--train.device", "cpu"),
)
QUICK_RUN = (
    *("--clients", "6", "--rounds", "6", "--model.pool", "mlp4,mlp5", "--model.shared", "mlp5"),
    *("--run.checkpoint_every", "1", "--run.dir", "run"),
)


@dataclass(frozen=True)
class Result:
    """A command's exit code and output."""

    code: int
    out: str
    err: str


def error_message(result: Result, pattern: str) -> str:
    """Return the only message of a refused command line; it must match `pattern` and state a remedy."""
    assert result.code == 2, f"exit {result.code}\n{result.out}\n{result.err}"
    assert result.err.count("error: ") == 1 and result.err.count("remedy: ") == 1, result.err
    assert "Traceback" not in result.err and "Warning" not in result.err
    message = result.err[result.err.index("error: ") :]
    assert re.search(pattern, message), message
    assert message.split("remedy: ")[1].strip(), "an empty remedy"
    return message


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl with the clients' numbers of the folder `measured`."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = measured.read(run / measured.FOLDER, [row["round"] for row in rows])
    return [{**row, "clients": dict(found[row["round"]])} for row in rows]


def read_events(run: Path) -> list[dict[str, Any]]:
    """Return the events of events.jsonl."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def reproducible_rows(run: Path) -> list[dict[str, Any]]:
    """Return the metrics rows without times, memory and MPI traffic, which differ between equal runs."""
    return [
        {k: v for k, v in row.items() if k not in {"seconds", "seconds_ranks", "rss_mb", "mpi_bytes"}}
        for row in read_metrics(run)
    ]


def clean_environment(mpi: str, extra: dict[str, str]) -> dict[str, str]:
    """Return the environment without launcher variables, with one thread per rank and the MPI to load."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    clean["OMP_NUM_THREADS"] = "1"
    if mpi == "openmpi":
        folder = openmpi_folder()
        clean["PATH"] = f"{folder / 'bin'}{os.pathsep}{clean['PATH']}"
        clean["MPI4PY_MPIABI"], clean["MPI4PY_LIBMPI"] = "openmpi", str(folder / "lib" / "libmpi.so.40")
    return {**clean, **extra}


def openmpi_folder() -> Path:
    """Return the folder of the Open MPI installed beside MPICH; without it skip the test, or fail in CI."""
    folder = Path(os.environ.get("PFEDMOE_OPENMPI") or ROOT / ".openmpi").absolute()
    if not (folder / "lib" / "libmpi.so.40").exists():
        reason = (
            f"no Open MPI in {folder}: pip install --no-deps --ignore-installed --prefix {folder} openmpi, "
            "or name its folder in PFEDMOE_OPENMPI"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


def start_program(
    ranks: int, *arguments: str, cwd: Path, mpi: str = "mpich", env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start `mpirun -n RANKS python -m pfedmoe_mpi ARGUMENTS`; 0 ranks start without mpirun."""
    command = [sys.executable, "-m", "pfedmoe_mpi", *arguments]
    if ranks and mpi == "openmpi":
        flags = ["--oversubscribe", "--allow-run-as-root"]
        command = [str(openmpi_folder() / "bin" / "mpirun"), *flags, "-n", str(ranks), *command]
    elif ranks:
        command = [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks), *command]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=clean_environment(mpi, env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def wait_for_end(process: subprocess.Popen[str], timeout: float) -> Result:
    """Return the result; after `timeout` seconds kill all processes and fail the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        out, err = process.communicate()
        pytest.fail(f"no end within {timeout} s: {process.args}\n{out}\n{err}")
    return Result(process.returncode, out, err)


def run_program(
    ranks: int,
    *arguments: str,
    cwd: Path,
    mpi: str = "mpich",
    timeout: float = 120,
    env: dict[str, str] | None = None,
) -> Result:
    """Start the program and wait for its end."""
    return wait_for_end(start_program(ranks, *arguments, cwd=cwd, mpi=mpi, env=env), timeout)


def kill_tree(pid: int) -> None:
    """Kill a process and all its descendants, whatever their process groups."""
    for process in [pid, *descendants(pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Return the process ids of all descendants; a process that has ended has none."""
    threads, found = Path("/proc", str(pid), "task"), []
    with contextlib.suppress(OSError):
        for thread in os.listdir(threads):
            with contextlib.suppress(OSError):
                found += [int(child) for child in (threads / thread / "children").read_text().split()]
    return [*found, *(below for child in found for below in descendants(child))]


@contextlib.contextmanager
def running_job(
    ranks: int, *arguments: str, cwd: Path, mpi: str = "mpich"
) -> Iterator[subprocess.Popen[str]]:
    """Run a job inside the block; kill it and its descendants when the block ends."""
    process = start_program(ranks, *arguments, cwd=cwd, mpi=mpi)
    try:
        yield process
    finally:
        kill_tree(process.pid)
        process.communicate()


def rank_processes(mpirun: int) -> dict[int, int]:
    """Return {rank: process id} of the ranks below an mpirun."""
    return {_rank(pid): pid for pid in descendants(mpirun) if b"-m\0pfedmoe_mpi" in _command(pid)}


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        return words if words.startswith(sys.executable.encode()) else b""
    return b""


def _rank(pid: int) -> int:
    with contextlib.suppress(OSError):
        for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            name, _, value = word.partition(b"=")
            if name in {b"PMI_RANK", b"OMPI_COMM_WORLD_RANK"}:
                return int(value)
    return -1


def wait_for_file(path: Path, job: subprocess.Popen[str], timeout: float = 120) -> None:
    """Wait until the file has content."""
    deadline = time.monotonic() + timeout
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline, f"{path} did not appear"
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)


def run_to_end(
    ranks: int, *arguments: str, cwd: Path, timeout: float = 240, mpi: str = "mpich", own_job: bool = False
) -> str:
    """Return the output of a command line that must exit with 0.

    On up to three ranks it runs in the job that all such command lines share, unless it is to have its own.
    """
    if ranks > MOST_SHARED or mpi != "mpich" or own_job:
        result = run_program(ranks, *arguments, cwd=cwd, timeout=timeout, mpi=mpi)
    else:
        result = shared_session(ranks)(*arguments, cwd=cwd, timeout=timeout)
    assert result.code == 0, result.out + result.err
    return result.out + result.err


def checkpoint_digest(run: Path, round: int) -> str:
    """Return `inspect --digest` of a round's complete checkpoint in a run folder."""
    from pfedmoe_mpi import checkpoint
    from pfedmoe_mpi.commands import inspect

    path = run / "checkpoints" / checkpoint.name(round, partial=False)
    checkpoint.verify(path)
    with checkpoint.Checkpoint(path) as loaded:
        return inspect.digest(loaded)


class Session:
    """Command lines run one after the other in one process, or in one job of several ranks, to save time.

    The process starts with the first command line, and again with the one after a failure.
    """

    def __init__(self, ranks: int = 1) -> None:
        self._launcher = [] if ranks == 1 else [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks)]
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 what the process writes to stderr

    def __call__(self, *arguments: str, cwd: Path, timeout: float = 120) -> Result:
        process, logged = self._started(), os.fstat(self._log.fileno()).st_size
        assert process.stdin and process.stdout
        try:
            process.stdin.write(json.dumps([str(cwd), *map(str, arguments)]) + "\n")
            process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                line = process.stdout.readline() if selector.select(timeout) else ""
        except BaseException:  # the test's time limit: the next command line must not get this one's answer
            self.close()
            raise
        if not (line.startswith("[") and line.endswith("\n")):  # or mpirun reports an end
            self.close()
            said = os.pread(self._log.fileno(), 100_000, logged).decode(errors="replace")
            pytest.fail(f"the process ended, or took more than {timeout} s: {' '.join(arguments)}\n{said}")
        return Result(*json.loads(line))

    def _started(self) -> subprocess.Popen[str]:
        if self._process and self._process.poll() is not None:
            self.close()
        if self._process is None:
            self._process = subprocess.Popen(
                [*self._launcher, sys.executable, "-m", "support.command_server"],
                env=with_support(clean_environment("mpich", {})),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                start_new_session=True,
            )
        return self._process

    def end(self) -> None:
        """Let the process end by itself, as it then removes its shared memory."""
        if self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.communicate(timeout=10)  # without input there is no next command line
            self.close()

    def close(self) -> None:
        """Kill the process; the next command line starts another."""
        if self._process:
            kill_tree(self._process.pid)
            self._process.communicate()
            self._process = None


@cache
def shared_session(ranks: int) -> Session:
    """Return the session of all tests on so many ranks; it ends with this process."""
    session = Session(ranks)
    atexit.register(session.end)
    return session
