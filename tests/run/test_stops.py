"""Stops: at the wall-time limit, by a signal to any rank in any phase, and legs that bring nothing."""

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
from pfedmoe_mpi.mpi import comm
from support import launcher
from support.data_files import shared_data
from support.fault_injection import AT_THE_ROOT, PHASES
from support.launcher import SMALL, events, finished, learned_digest, rank_processes, running, told, wait_for
from support.mpi_job import Ended, mpirun

FLAGS = (*SMALL, "--clients", "6", "--rounds", "4", "--run.checkpoint_every", "1")
STOPPED = [phase for phase in PHASES if phase not in {"data", "folder", "end"}]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of FLAGS."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finished(2, *FLAGS, "--run.dir", "run", cwd=folder)
    return learned_digest(folder / "run", 4)


def stopped(rank: int, phase: str, *arguments: str, mpi: str = "mpich") -> Ended:
    """A job of three ranks of which one gets SIGUSR1 in a phase."""
    return mpirun("fault_injection", "stop", str(rank), phase, *arguments, ranks=3, mpi=mpi)


@pytest.mark.parametrize(("number", "phase"), list(enumerate(STOPPED)))
def test_a_signal_to_one_rank_in_any_phase(
    tmp_path: Path, session: launcher.Session, undisturbed: str, number: int, phase: str
) -> None:
    """75, a checkpoint, and the restart on another number of ranks repeats the bits."""
    rank = 0 if phase in AT_THE_ROOT else (number + 1) % 3
    ended = stopped(rank, phase, *FLAGS, "--run.dir", str(tmp_path / "run"))
    assert ended.code == 75 and ended.left == 0, ended.output
    stop = events(tmp_path / "run")[-1]
    assert stop["event"] == "stop" and stop["by"] in {f"SIGUSR1 to rank {rank}", ""}
    assert checkpoint.newest_first(tmp_path / "run" / "checkpoints")
    again = session("restart", "run", cwd=tmp_path)
    assert again.code == 0, again.err
    assert learned_digest(tmp_path / "run", 4) == undisturbed


@pytest.mark.parametrize("mpi", ["mpich", pytest.param("openmpi", marks=pytest.mark.openmpi)])
def test_a_signal_to_an_idle_rank_alone_stops_all(tmp_path: Path, mpi: str) -> None:
    """One client on three ranks: two wait inside the sum, and one of them is told."""
    lonely = (*SMALL, "--clients", "1", "--rounds", "50", "--train.epochs", "3000", "--run.dir", "run")
    with running(3, *lonely, "--partition.kind", "iid", cwd=tmp_path, mpi=mpi) as job:
        wait_for(tmp_path / "run" / "events.jsonl", job)
        time.sleep(1.0)
        os.kill(rank_processes(job.pid)[2], signal.SIGUSR1)
        sent = time.monotonic()
        result = launcher.ended(job, 60)
        seconds = time.monotonic() - sent
    assert result.code == 75, result.out + result.err
    assert seconds < 10, "a step of minutes was not left at its next batch"


@pytest.mark.parametrize("moment", ["python", "mpi"])
def test_a_signal_while_the_job_starts_is_not_lost(tmp_path: Path, moment: str) -> None:
    """Sent to a rank as soon as it is there, or has loaded MPI: the stop comes all the same."""
    with running(2, *FLAGS, "--rounds", "5000", "--run.dir", "run", cwd=tmp_path) as job:
        pid = starting(job, "libmpi" if moment == "mpi" else "pydantic_core")
        os.kill(pid, signal.SIGUSR1)
        result = launcher.ended(job, 90)
    assert result.code == 75, result.out + result.err


def starting(job: subprocess.Popen[str], library: str) -> int:
    """Rank 1 as soon as it has loaded a library."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pid = rank_processes(job.pid).get(1)
        with contextlib.suppress(OSError):
            if pid and library in Path(f"/proc/{pid}/maps").read_text():
                return pid
    raise AssertionError(f"rank 1 never loaded {library}")


def test_signals_that_go_on_do_not_change_the_exit_code(tmp_path: Path) -> None:
    """A script that sends its warning again and again, to the ranks."""
    with running(2, *FLAGS, "--rounds", "5000", "--run.dir", "run", cwd=tmp_path) as job:
        wait_for(tmp_path / "run" / "metrics.jsonl", job)
        ranks = list(rank_processes(job.pid).values())
        while job.poll() is None:
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)
            time.sleep(0.002)
        result = launcher.ended(job, 60)
    assert result.code == 75, result.out + result.err


@pytest.mark.parametrize("method", ["fedgh", "fedtgp"])
def test_a_stop_while_the_server_trains(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left at its next step, and done again from the sum, to the same bits."""
    flags = dict(zip((word.removeprefix("--") for word in SMALL[::2]), SMALL[1::2], strict=True))
    chosen = config.build({**flags, "algorithm": method, "rounds": 1})

    def fresh() -> Loop:
        world = comm.start().split(0)
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


def test_the_run_stops_before_its_wall_time(tmp_path: Path) -> None:
    started = time.monotonic()
    endless = (*SMALL, "--rounds", "100000", "--run.walltime", "20", "--run.dir", "run")
    result = launcher.program(2, *endless, cwd=tmp_path)
    seconds = time.monotonic() - started
    assert result.code == 75, result.out + result.err
    assert seconds > 12, f"{seconds:.1f} s"
    assert "stopped by the wall-time limit" in result.out and "restart" in result.out
    start, stop = events(tmp_path / "run")
    # At nine tenths since its process began, so that it is over before the limit; on a busy machine too.
    passed = datetime.fromisoformat(stop["time"]) - datetime.fromisoformat(start["time"])
    assert passed < timedelta(seconds=20), f"{passed} from first to last event, {seconds:.1f} s in all"
    assert (stop["event"], stop["by"]) == ("stop", "the wall-time limit") and stop["steps"] > 0


# Legs that bring nothing


def test_two_legs_without_a_step_end_the_run(tmp_path: Path, undisturbed: str) -> None:
    """What a job script would requeue for ever."""
    run = str(tmp_path / "run")
    first = stopped(1, "clients", *FLAGS, "--run.dir", run)
    assert first.code == 75 and "no client's step was done" in first.output, first.output
    second = stopped(2, "clients", "restart", run)
    assert second.code == 1 and second.output.count("error: stopped 2 times in a row") == 1, second.output
    assert "remedy: give the job more time" in second.output and "Traceback" not in second.output
    finished(2, "restart", run, cwd=tmp_path)
    assert learned_digest(tmp_path / "run", 4) == undisturbed


def test_legs_with_a_step_go_on_for_ever(tmp_path: Path, session: launcher.Session) -> None:
    """A leg of one step between two without any is progress; a round in progress keeps its cohort."""
    run = str(tmp_path / "run")
    assert stopped(0, "clients", *FLAGS, "--run.dir", run).code == 75
    assert stopped(0, "contribution", "restart", run).code == 75
    other = session("restart", run, "--participation", "0.5", cwd=tmp_path)
    told(other, "round 1 is in progress; its cohort was drawn with participation = 1.0")
    ended = stopped(0, "clients", "restart", run)
    assert ended.code == 75 and "no client's step was done" in ended.output, ended.output


# How long a stop takes


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mpi", ["mpich", pytest.param("openmpi", marks=pytest.mark.openmpi)])
def test_seconds_from_signal_to_exit_on_cifar10(tmp_path: Path, mpi: str) -> None:
    """Ten clients of CNN-1 to CNN-5, 20 random moments; median and worst."""
    with tarfile.open(shared_data("cifar10-images.tar")) as images:
        images.extractall(tmp_path / "cifar", filter="data")
    (path,) = {path.parent for path in (tmp_path / "cifar").glob("**/train")}
    prepared = launcher.program(
        0, "data", "prepare", "cifar.h5", "--data.source", "folder", "--data.path", str(path), cwd=tmp_path
    )
    assert prepared.code == 0, prepared.err
    flags = ("--data.source", "hdf5", "--data.path", "cifar.h5", "--clients", "10", "--train.batch", "128")
    taken = []
    for trial in range(20):
        run = f"run{trial}"
        draw = random.Random(trial)
        many = (*flags, "--partition.kind", "pathological", "--rounds", "500", "--run.dir", run)
        with running(2, *many, cwd=tmp_path, mpi=mpi) as job:
            wait_for(tmp_path / run / "events.jsonl", job)
            time.sleep(draw.uniform(0.5, 20))  # more than a round
            job.send_signal(signal.SIGUSR1)
            sent = time.monotonic()
            result = launcher.ended(job, 60)
            taken.append(time.monotonic() - sent)
        assert result.code == 75, result.out + result.err
    print(f"{mpi}: median {statistics.median(taken):.2f} s, worst of {len(taken)} {max(taken):.2f} s")
    assert max(taken) < 5
