"""Stops at the wall-time limit and by a signal to any rank in any phase, and restarts without progress."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import subprocess
import tarfile
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pfedmoe_mpi import checkpoint, config
from pfedmoe_mpi.federation import build
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.mpi import launch
from support import launcher
from support.data_files import shared_data
from support.fault_injection import PHASES, PREPARED, ROOT_PHASES
from support.launcher import (
    SMALL_RUN,
    checkpoint_digest,
    error_message,
    rank_processes,
    read_events,
    run_to_end,
    running_job,
    wait_for_file,
)
from support.mpi_job import JobResult, run_module

FLAGS = (*SMALL_RUN, "--clients", "6", "--rounds", "4", "--run.checkpoint_every", "1")
STOPPED = [phase for phase in PHASES if phase not in {"data", "folder", "end"}]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of FLAGS."""
    return digest(tmp_path_factory.mktemp("undisturbed"), *FLAGS)


def digest(folder: Path, *flags: str) -> str:
    """Return the digest of an undisturbed run in a folder, which is made."""
    folder.mkdir(exist_ok=True)
    run_to_end(2, *flags, "--run.dir", "run", cwd=folder)
    return checkpoint_digest(folder / "run", 4)


def stopped(rank: int, phase: str, *arguments: str, mpi: str = "mpich") -> JobResult:
    """Run three ranks of which one gets SIGUSR1 in a phase."""
    return run_module("fault_injection", "stop", str(rank), phase, *arguments, ranks=3, mpi=mpi)


@pytest.mark.parametrize(("number", "phase"), list(enumerate(STOPPED)))
def test_signal_to_one_rank_in_any_phase_stops_with_75(
    tmp_path: Path, session: launcher.Session, undisturbed: str, number: int, phase: str
) -> None:
    """The run exits with 75 and a checkpoint; the restart on other ranks gives the same bits."""
    rank = 0 if phase in ROOT_PHASES else (number + 1) % 3
    flags, expected = FLAGS, undisturbed
    if phase == "preparation":
        flags = (*FLAGS, *PREPARED)
        expected = digest(tmp_path / "undisturbed", *flags)
    ended = stopped(rank, phase, *flags, "--run.dir", str(tmp_path / "run"))
    assert ended.code == 75 and ended.left == 0, ended.output
    stop = read_events(tmp_path / "run")[-1]
    assert stop["event"] == "stop" and stop["by"] in {f"SIGUSR1 to rank {rank}", ""}
    assert checkpoint.newest_first(tmp_path / "run" / "checkpoints")
    again = session("restart", "run", cwd=tmp_path)
    assert again.code == 0, again.err
    assert checkpoint_digest(tmp_path / "run", 4) == expected


@pytest.mark.parametrize("mpi", ["mpich", pytest.param("openmpi", marks=pytest.mark.openmpi)])
def test_signal_to_an_idle_rank_stops_all(tmp_path: Path, mpi: str) -> None:
    """With one client on three ranks, two wait inside the sum, and one of these gets the signal."""
    lonely = (*SMALL_RUN, "--clients", "1", "--rounds", "50", "--train.epochs", "3000", "--run.dir", "run")
    with running_job(3, *lonely, "--partition.kind", "iid", cwd=tmp_path, mpi=mpi) as job:
        wait_for_file(tmp_path / "run" / "events.jsonl", job)
        time.sleep(1.0)
        os.kill(rank_processes(job.pid)[2], signal.SIGUSR1)
        sent = time.monotonic()
        result = launcher.wait_for_end(job, 60)
        seconds = time.monotonic() - sent
    assert result.code == 75, result.out + result.err
    assert seconds < 10, "a step of minutes was not left at its next batch"


@pytest.mark.parametrize("moment", ["python", "mpi"])
def test_signal_during_start_is_not_lost(tmp_path: Path, moment: str) -> None:
    """Sent to a rank as soon as it exists, or has loaded MPI, the signal still stops the run."""
    with running_job(2, *FLAGS, "--rounds", "5000", "--run.dir", "run", cwd=tmp_path) as job:
        pid = starting(job, "libmpi" if moment == "mpi" else "pydantic_core")
        os.kill(pid, signal.SIGUSR1)
        result = launcher.wait_for_end(job, 90)
    assert result.code == 75, result.out + result.err


def starting(job: subprocess.Popen[str], library: str) -> int:
    """Return rank 1's process id as soon as it has loaded a library."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pid = rank_processes(job.pid).get(1)
        with contextlib.suppress(OSError):
            if pid and library in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8"):
                return pid
    raise AssertionError(f"rank 1 never loaded {library}")


def test_repeated_signals_keep_the_exit_code(tmp_path: Path) -> None:
    """A script may send its warning to the ranks again and again."""
    with running_job(2, *FLAGS, "--rounds", "5000", "--run.dir", "run", cwd=tmp_path) as job:
        wait_for_file(tmp_path / "run" / "metrics.jsonl", job)
        ranks = list(rank_processes(job.pid).values())
        while job.poll() is None:
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)
            time.sleep(0.002)
        result = launcher.wait_for_end(job, 60)
    assert result.code == 75, result.out + result.err


@pytest.mark.parametrize("method", ["fedgh", "fedtgp"])
def test_stop_during_server_training_is_repeated(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training stops at its next step and is repeated from the sum, to the same bits."""
    flags = dict(zip((word.removeprefix("--") for word in SMALL_RUN[::2]), SMALL_RUN[1::2], strict=True))
    chosen = config.build({**flags, "algorithm": method, "rounds": 1})

    def fresh() -> Loop:
        world = launch.start().split(0)
        assert world
        return Loop(world, build.build(world, chosen), SilentObserver(), tmp_path)

    whole, loop = fresh(), fresh()
    assert whole.run()
    (tmp_path / "round-000001.h5").unlink()
    kind, ended = type(loop.federation.method), []

    def interrupted(*given: Any) -> None:
        loop.comm.signal_received = signal.SIGUSR1
        update(loop.federation.method, *given)
        ended.append(True)

    update = kind.server_update
    with monkeypatch.context() as patch:
        patch.setattr(kind, "server_update", lambda self, *given: interrupted(*given))
        assert not loop.run() and not ended, "the server trained to its end"
    again = fresh()
    with checkpoint.Checkpoint(tmp_path / "round-000001-partial.h5") as loaded:
        assert len(loaded.finished) == again.federation.task.clients
        again.resume(loaded)
    assert again.run() and again.state.numpy().tobytes() == whole.state.numpy().tobytes()


# The wall-time limit


def test_run_stops_before_its_wall_time(tmp_path: Path) -> None:
    started = time.monotonic()
    endless = (*SMALL_RUN, "--rounds", "100000", "--run.walltime", "20", "--run.dir", "run")
    result = launcher.run_program(2, *endless, cwd=tmp_path)
    seconds = time.monotonic() - started
    assert result.code == 75, result.out + result.err
    assert seconds > 12, f"{seconds:.1f} s"
    assert "stopped by the wall-time limit" in result.out and "restart" in result.out
    start, stop = read_events(tmp_path / "run")
    # At nine tenths since its process began, so that it is over before the limit; on a busy machine too.
    passed = datetime.fromisoformat(stop["time"]) - datetime.fromisoformat(start["time"])
    assert passed < timedelta(seconds=20), f"{passed} from first to last event, {seconds:.1f} s in all"
    assert (stop["event"], stop["by"]) == ("stop", "the wall-time limit") and stop["steps"] > 0


# Legs that bring nothing


def test_two_restarts_without_a_step_end_the_run(tmp_path: Path, undisturbed: str) -> None:
    """A job script would requeue such a run for ever."""
    run = str(tmp_path / "run")
    first = stopped(1, "clients", *FLAGS, "--run.dir", run)
    assert first.code == 75 and "no client's step was done" in first.output, first.output
    second = stopped(2, "clients", "restart", run)
    assert second.code == 1 and second.output.count("error: stopped 2 times in a row") == 1, second.output
    assert "remedy: give the job more time" in second.output and "Traceback" not in second.output
    run_to_end(2, "restart", run, cwd=tmp_path)
    assert checkpoint_digest(tmp_path / "run", 4) == undisturbed


def test_restarts_with_a_step_always_continue(tmp_path: Path, session: launcher.Session) -> None:
    """One step between two restarts without any is progress; a round in progress keeps its cohort."""
    run = str(tmp_path / "run")
    assert stopped(0, "clients", *FLAGS, "--run.dir", run).code == 75
    assert stopped(0, "contribution", "restart", run).code == 75
    other = session("restart", run, "--participation", "0.5", cwd=tmp_path)
    error_message(other, "round 1 is in progress; its cohort was drawn with participation = 1.0")
    ended = stopped(0, "clients", "restart", run)
    assert ended.code == 75 and "no client's step was done" in ended.output, ended.output


# How long a stop takes


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mpi", ["mpich", pytest.param("openmpi", marks=pytest.mark.openmpi)])
def test_exit_follows_a_signal_within_seconds_on_cifar10(tmp_path: Path, mpi: str) -> None:
    """Ten clients of CNN-1 to CNN-5 are stopped at 20 random moments; prints median and worst."""
    with tarfile.open(shared_data("cifar10-images.tar")) as images:
        images.extractall(tmp_path / "cifar", filter="data")
    (path,) = {path.parent for path in (tmp_path / "cifar").glob("**/train")}
    prepared = launcher.run_program(
        0, "data", "prepare", "cifar.h5", "--data.source", "folder", "--data.path", str(path), cwd=tmp_path
    )
    assert prepared.code == 0, prepared.err
    flags = ("--data.source", "hdf5", "--data.path", "cifar.h5", "--clients", "10", "--train.batch", "128")
    taken = []
    for trial in range(20):
        run = f"run{trial}"
        draw = random.Random(trial)
        many = (*flags, "--partition.kind", "pathological", "--rounds", "500", "--run.dir", run)
        with running_job(2, *many, cwd=tmp_path, mpi=mpi) as job:
            wait_for_file(tmp_path / run / "events.jsonl", job)
            time.sleep(draw.uniform(0.5, 20))  # more than a round
            job.send_signal(signal.SIGUSR1)
            sent = time.monotonic()
            result = launcher.wait_for_end(job, 60)
            taken.append(time.monotonic() - sent)
        assert result.code == 75, result.out + result.err
    print(f"{mpi}: median {statistics.median(taken):.2f} s, worst of {len(taken)} {max(taken):.2f} s")
    assert max(taken) < 5
