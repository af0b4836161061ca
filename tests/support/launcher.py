"""The program as its users start it, and many of its command lines in one process, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT, with_support

LAUNCHERS = ("PMI", "OMPI_", "PRTE_", "SLURM_", "MPI4PY_", "OMP_")  # what a job around the tests may have set

SMALL = (
    *("--data.source", "synthetic", "--data.samples", "200", "--data.size", "8", "--clients", "4"),
    *("--model.pool", "mlp5,mlp4", "--model.shared", "mlp5", "--rounds", "1", "--train.device", "cpu"),
)
QUICK = (
    *("--clients", "6", "--rounds", "6", "--model.pool", "mlp4,mlp5", "--model.shared", "mlp5"),
    *("--run.checkpoint_every", "1", "--train.epochs", "2", "--run.dir", "run"),
)


@dataclass(frozen=True)
class Result:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's names and files."""
    if path.is_file():
        return sha256(path.read_bytes()).hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return sha256("".join(f"{p.relative_to(path)} {digest(p)}\n" for p in files).encode()).hexdigest()


def told(result: Result, pattern: str) -> str:
    """The one message of a refused command line; it matches `pattern` and holds a remedy."""
    assert result.code == 2, f"exit {result.code}\n{result.out}\n{result.err}"
    assert result.err.count("error: ") == 1 and result.err.count("remedy: ") == 1, result.err
    assert "Traceback" not in result.err and "Warning" not in result.err
    message = result.err[result.err.index("error: ") :]
    assert re.search(pattern, message), message
    assert message.split("remedy: ")[1].strip(), "an empty remedy"
    return message


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path) -> list[dict[str, Any]]:
    """events.jsonl."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def learned(run: Path) -> list[dict[str, Any]]:
    """The rows without what differs between runs of the same bits."""
    return [
        {k: v for k, v in row.items() if k not in {"seconds", "seconds_ranks", "rss_mb", "mpi_bytes"}}
        for row in rows(run)
    ]


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 16]))


def environment(mpi: str, extra: dict[str, str]) -> dict[str, str]:
    """The tests' environment without any launcher's words, one thread per rank, and the MPI to load."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    clean["OMP_NUM_THREADS"] = "1"
    if mpi == "openmpi":
        folder = openmpi()
        clean["PATH"] = f"{folder / 'bin'}{os.pathsep}{clean['PATH']}"
        clean["MPI4PY_MPIABI"], clean["MPI4PY_LIBMPI"] = "openmpi", str(folder / "lib" / "libmpi.so.40")
    return {**clean, **extra}


def openmpi() -> Path:
    """Where Open MPI is installed beside MPICH; without it the test is skipped, in CI failed."""
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


def start(
    ranks: int, *arguments: str, cwd: Path, mpi: str = "mpich", env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start `mpirun -n RANKS python -m pfedmoe_mpi ARGUMENTS`, without mpirun for 0 ranks."""
    command = [sys.executable, "-m", "pfedmoe_mpi", *arguments]
    if ranks and mpi == "openmpi":
        flags = ["--oversubscribe", "--allow-run-as-root"]
        command = [str(openmpi() / "bin" / "mpirun"), *flags, "-n", str(ranks), *command]
    elif ranks:
        command = [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks), *command]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(mpi, env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], timeout: float) -> Result:
    """How it ended; the test fails if it does not within `timeout` seconds, with nothing left running."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end(process.pid)
        out, err = process.communicate()
        pytest.fail(f"no end within {timeout} s: {process.args}\n{out}\n{err}")
    return Result(process.returncode, out, err)


def program(
    ranks: int,
    *arguments: str,
    cwd: Path,
    mpi: str = "mpich",
    timeout: float = 120,
    env: dict[str, str] | None = None,
) -> Result:
    """`start` and `ended`."""
    return ended(start(ranks, *arguments, cwd=cwd, mpi=mpi, env=env), timeout)


def end(pid: int) -> None:
    """Kill a process with all it started, whatever groups they made."""
    for process in [pid, *descendants(pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Children, grandchildren and so on, by their numbers."""
    found = []
    for task in Path("/proc", str(pid), "task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in task.read_text().split()]
    return [*found, *(below for child in found for below in descendants(child))]


@contextlib.contextmanager
def running(ranks: int, *arguments: str, cwd: Path, mpi: str = "mpich") -> Iterator[subprocess.Popen[str]]:
    """A job, killed with all it started when the block ends."""
    process = start(ranks, *arguments, cwd=cwd, mpi=mpi)
    try:
        yield process
    finally:
        end(process.pid)
        process.communicate()


def rank_processes(mpirun: int) -> dict[int, int]:
    """The process of every rank below an mpirun."""
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


def wait_for(path: Path, job: subprocess.Popen[str], timeout: float = 120) -> None:
    """Until the file has content."""
    deadline = time.monotonic() + timeout
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline, f"{path} did not appear"
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)


def finished(ranks: int, *arguments: str, cwd: Path, timeout: float = 240, mpi: str = "mpich") -> str:
    """The output of a job that must end well."""
    result = program(ranks, *arguments, cwd=cwd, timeout=timeout, mpi=mpi)
    assert result.code == 0, result.out + result.err
    return result.out + result.err


def learned_digest(run: Path, round: int) -> str:
    """`inspect --digest` of a whole checkpoint of a run folder."""
    from pfedmoe_mpi import checkpoint
    from pfedmoe_mpi.commands import checkpoints

    path = run / "checkpoints" / checkpoint.name(round, partial=False)
    checkpoint.verify(path)
    with checkpoint.Checkpoint(path) as loaded:
        return checkpoints.digest(loaded)


class Session:
    """Command lines one after the other in one process without a launcher: what they say costs no start."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, *arguments: str, cwd: Path, timeout: float = 60) -> Result:
        process = self._started()
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps([str(cwd), *map(str, arguments)]) + "\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            line = process.stdout.readline() if selector.select(timeout) else ""
        if not line:
            self.close()
            pytest.fail(f"the process ended, or said nothing within {timeout} s: {' '.join(arguments)}")
        return Result(*json.loads(line))

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.command_server"],
                env=with_support(environment("mpich", {})),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        return self._process

    def close(self) -> None:
        """End the process; the next command line starts another."""
        if self._process:
            end(self._process.pid)
            self._process.communicate()
            self._process = None
