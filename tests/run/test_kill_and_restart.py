"""The main job as a user runs it: real mpirun, real kills, real restarts, real data."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pfedmoe_mpi import checkpoint
from support import launcher
from support.data_files import shared_data
from support.launcher import QUICK, finished, rank_processes, running, wait_for
from support.launcher import learned_digest as digest
from support.paths import ROOT

# The same bits


def test_default_settings_on_any_number_of_ranks(tmp_path: Path) -> None:
    found = {}
    for ranks in (1, 2, 3, 4, 7, 16):
        finished(ranks, "--rounds", "2", "--run.dir", str(ranks), cwd=tmp_path)
        found[ranks] = digest(tmp_path / str(ranks), 2)
    assert len(set(found.values())) == 1, found


def test_participation_below_one_on_any_number_of_ranks(tmp_path: Path) -> None:
    """Some of a small cohort train away from home, and come back changed."""
    found = {}
    for ranks in (1, 2, 4):
        finished(ranks, *QUICK, "--participation", "0.5", "--run.dir", str(ranks), cwd=tmp_path)
        found[ranks] = digest(tmp_path / str(ranks), 6)
    assert len(set(found.values())) == 1, found


@pytest.mark.openmpi
def test_open_mpi_gives_the_same_bits(tmp_path: Path, undisturbed: tuple[str, float]) -> None:
    finished(4, *QUICK, cwd=tmp_path, mpi="openmpi")
    assert digest(tmp_path / "run", 6) == undisturbed[0]


# Interruptions


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """(digest, seconds from config.toml to the end) of the quick run on two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with running(2, *QUICK, cwd=folder) as job:
        wait_for(folder / "run" / "config.toml", job)
        started = time.monotonic()
        result = launcher.ended(job, 240)
        seconds = time.monotonic() - started
    assert result.code == 0, result.out + result.err
    return digest(folder / "run", 6), seconds


def kills(number: int) -> Iterator[tuple[int, random.Random]]:
    seed = int(os.environ.get("PFEDMOE_KILL_SEED") or random.randrange(10**6))
    print(f"PFEDMOE_KILL_SEED={seed}")
    for trial in range(number):
        yield trial, random.Random(seed * 1000 + trial)


def survive(tmp_path: Path, draw: random.Random, expected: tuple[str, float]) -> str:
    """Kill something at a random moment once config.toml exists, restart, compare; what happened.

    Every third moment is one in which a checkpoint is being written, if there is another one.
    """
    wanted, seconds = expected
    with running(3, *QUICK, cwd=tmp_path) as job:
        wait_for(tmp_path / "run" / "config.toml", job)
        time.sleep(draw.uniform(0, seconds))
        writing = draw.random() < 1 / 3 and wait_for_a_write(tmp_path / "run" / "checkpoints", job)
        ranks = list(rank_processes(job.pid).values())
        what = draw.choice(["rank", "rank", "mpirun", "all"])
        victims = {"rank": ranks and [draw.choice(ranks)], "mpirun": [job.pid], "all": ranks}[what]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if what != "mpirun":
            launcher.ended(job, 60)  # the launcher notices by itself
    for path in checkpoint.newest_first(tmp_path / "run" / "checkpoints"):
        checkpoint.verify(path)  # whatever has a checkpoint's name is whole
    output = finished(draw.choice([1, 2, 4]), "restart", "run", cwd=tmp_path)
    assert digest(tmp_path / "run", 6) == wanted, output
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == list(range(1, 7))
    return what + (" while writing" if writing else "")


def wait_for_a_write(folder: Path, job: subprocess.Popen[str]) -> bool:
    """Whether a half-written checkpoint appeared before the job ended."""
    while job.poll() is None:
        if any(name.startswith(".round-") for name in os.listdir(folder)):
            return True
    return False


def test_kill_at_any_moment_and_restart(tmp_path: Path, undisturbed: tuple[str, float]) -> None:
    for trial, draw in kills(10):
        (tmp_path / str(trial)).mkdir()
        survive(tmp_path / str(trial), draw, undisturbed)


@pytest.mark.campaign
@pytest.mark.timeout(7200)
def test_kill_campaign(tmp_path: Path, undisturbed: tuple[str, float]) -> None:
    count: dict[str, int] = {}
    for trial, draw in kills(100):
        (tmp_path / str(trial)).mkdir()
        what = survive(tmp_path / str(trial), draw, undisturbed)
        count[what] = count.get(what, 0) + 1
    print(count)


LONG_ROUNDS = (*QUICK, "--train.epochs", "40", "--rounds", "2")


@pytest.fixture(scope="module")
def two_long_rounds(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of an undisturbed run whose rounds take long enough to be stopped in."""
    folder = tmp_path_factory.mktemp("long")
    finished(2, *LONG_ROUNDS, cwd=folder)
    return digest(folder / "run", 2)


@pytest.mark.parametrize(
    ("family", "number"),
    [
        ("mpich", signal.SIGUSR1),
        ("mpich", signal.SIGTERM),
        ("mpich", signal.SIGINT),
        pytest.param("openmpi", signal.SIGUSR1, marks=pytest.mark.openmpi),
    ],
)
def test_a_signal_to_mpirun_stops_in_the_round_with_75(
    tmp_path: Path, two_long_rounds: str, family: str, number: signal.Signals
) -> None:
    """mpirun passes the signal on; the run stops within the round, and the restart repeats the bits."""
    with running(2, *LONG_ROUNDS, cwd=tmp_path, mpi=family) as job:
        wait_for(tmp_path / "run" / "metrics.jsonl", job)
        job.send_signal(number)
        result = launcher.ended(job, 60)
    assert result.code == 75, result.out + result.err
    newest = checkpoint.newest_first(tmp_path / "run" / "checkpoints")[0]
    assert newest.name in {"round-000001.h5", "round-000002-partial.h5"}
    finished(3, "restart", "run", cwd=tmp_path)
    assert digest(tmp_path / "run", 2) == two_long_rounds


@pytest.mark.parametrize("moment", ["config.toml", "events.jsonl"])
def test_a_rank_that_stands_still_ends_the_job(tmp_path: Path, moment: str) -> None:
    """run.timeout holds before the first round and in it, where the rank is named."""
    with running(2, *LONG_ROUNDS, "--run.timeout", "3", cwd=tmp_path) as job:
        wait_for(tmp_path / "run" / moment, job)
        os.kill(rank_processes(job.pid)[1], signal.SIGSTOP)
        result = launcher.ended(job, 90)
    assert result.code not in {0, 2, 75}
    named = "rank 1 did not reach" in result.err and "within 3 s" in result.err
    within = "did not end within 3 s" in result.err  # stopped inside an exchange, where all had arrived
    assert named or (within and moment == "config.toml"), result.err


def test_falls_back_from_a_damaged_checkpoint(tmp_path: Path, undisturbed: tuple[str, float]) -> None:
    finished(2, *QUICK, cwd=tmp_path)
    newest = tmp_path / "run" / "checkpoints" / "round-000006.h5"
    (tmp_path / "run" / "checkpoints" / "best.h5").unlink()
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    output = finished(2, "restart", "run", cwd=tmp_path)
    assert "warning" in output and "damaged" in output
    assert digest(tmp_path / "run", 6) == undisturbed[0]


# The README's first command, real data


def test_first_command_of_the_readme(tmp_path: Path) -> None:
    line = re.search(
        r"^ *python -m venv .*'\.\[mpich\]' && (mpirun .*)$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert line, "the README does not print the command"
    mpirun, n, ranks, *rest = shlex.split(line[1])
    assert (mpirun, n, ranks, rest) == ("mpirun", "-n", "16", ["python", "-m", "pfedmoe_mpi"])
    output = finished(16, cwd=tmp_path, timeout=400)
    (folder,) = (tmp_path / "runs").iterdir()
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["accuracy"]["mean"] > 0.5, "ten digits, a few of them per client: chance is about 0.2"
    assert rows[-1]["accuracy"]["mean"] > rows[0]["accuracy"]["mean"] and "clients after round" in output
    assert len(list((folder / "log").iterdir())) == 16


def test_cifar10_trains_from_its_images(tmp_path: Path) -> None:
    with tarfile.open(shared_data("cifar10-images.tar")) as archive:
        archive.extractall(tmp_path / "cifar", filter="data")
    (images,) = {path.parent for path in (tmp_path / "cifar").glob("**/train")}
    source = ("--data.source", "folder", "--data.path", str(images), "--partition.kind", "pathological")
    few = ("--clients", "10", "--participation", "0.2", "--rounds", "3", "--eval.every", "3")
    steps = ("--train.batch", "128", "--train.epochs", "3", "--train.augment", "flip,erase,crop")
    finished(2, *source, *few, *steps, "--run.dir", "run", cwd=tmp_path)
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["accuracy_cohort"]["mean"] > 0.6, "two classes per client: chance is 0.5"
    assert sum(rows[-1]["clients"]["samples"]) == 48_000


def test_mnist_of_20_natural_clients(tmp_path: Path) -> None:
    finished(
        *(2, "--data.source", "npz", "--data.path", str(shared_data("mnist-20clients")), "--clients", "20"),
        *("--partition.kind", "natural", "--model.pool", "mnist1,mnist2,mnist3,mnist4,mnist5"),
        *("--model.shared", "mnist5", "--rounds", "2", "--run.dir", "run", "--participation", "0.5"),
        cwd=tmp_path,
    )
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["accuracy_cohort"]["weighted"] > 0.7
