"""Runs as a user starts them: mpirun, kills, restarts and real data."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pfedmoe_mpi import checkpoint
from support import launcher
from support.data_files import shared_data
from support.launcher import QUICK_RUN, rank_processes, run_to_end, running_job, wait_for_file
from support.launcher import checkpoint_digest as digest
from support.paths import ROOT

# The same bits


def test_default_run_has_the_same_bits_on_any_ranks(tmp_path: Path, readme_run: tuple[Path, str]) -> None:
    """Also on the 16 of the README's command, whose first rounds have every client's loss to the last bit."""
    found, rows = {}, {16: launcher.reproducible_rows(readme_run[0])[:2]}
    for ranks in (1, 2, 3, 7):
        run_to_end(ranks, "--rounds", "2", "--run.dir", str(ranks), cwd=tmp_path)
        found[ranks] = digest(tmp_path / str(ranks), 2)
        rows[ranks] = launcher.reproducible_rows(tmp_path / str(ranks))
    assert len(set(found.values())) == 1, found
    assert len(rows[1]) == 2 and all(of_run == rows[1] for of_run in rows.values()), rows


def test_partial_participation_has_the_same_bits_on_any_ranks(tmp_path: Path) -> None:
    """Some clients of a small cohort train on another rank, and their vectors return."""
    found = {}
    for ranks in (1, 2, 4):
        run_to_end(ranks, *QUICK_RUN, "--participation", "0.5", "--run.dir", str(ranks), cwd=tmp_path)
        found[ranks] = digest(tmp_path / str(ranks), 6)
    assert len(set(found.values())) == 1, found


@pytest.mark.openmpi
def test_open_mpi_gives_the_same_bits(tmp_path: Path, undisturbed: Undisturbed) -> None:
    run_to_end(3, *QUICK_RUN, cwd=tmp_path, mpi="openmpi")
    assert digest(tmp_path / "run", 6) == undisturbed.digest


# Interruptions


@dataclass(frozen=True)
class Undisturbed:
    """A finished run: its folder, its digest, and the seconds from config.toml to the end."""

    run: Path
    digest: str
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The quick run on two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with running_job(2, *QUICK_RUN, cwd=folder) as job:
        wait_for_file(folder / "run" / "config.toml", job)
        started = time.monotonic()
        result = launcher.wait_for_end(job, 240)
        seconds = time.monotonic() - started
    assert result.code == 0, result.out + result.err
    return Undisturbed(folder / "run", digest(folder / "run", 6), seconds)


def kills(number: int) -> Iterator[tuple[int, random.Random]]:
    seed = int(os.environ.get("PFEDMOE_KILL_SEED") or random.randrange(10**6))
    print(f"PFEDMOE_KILL_SEED={seed}")
    for trial in range(number):
        yield trial, random.Random(seed * 1000 + trial)


# Every client trains alone in its round, so that checkpoints lean on each other; no vector stays in memory.
SPILLING_RUN = (*QUICK_RUN, "--clients", "11", "--participation", "0.09", "--run.memory", "0")


@pytest.fixture(scope="module")
def undisturbed_spilling(tmp_path_factory: pytest.TempPathFactory, undisturbed: Undisturbed) -> Undisturbed:
    """The spilling run with all vectors in memory; it takes about the time of the other one."""
    folder = tmp_path_factory.mktemp("spilling")
    run_to_end(2, *SPILLING_RUN, "--run.memory", "1", cwd=folder)
    newest = folder / "run" / "checkpoints" / "round-000006.h5"
    assert checkpoint.files_needed(newest), "it relies on others"
    return Undisturbed(folder / "run", digest(folder / "run", 6), undisturbed.seconds)


def survive(
    tmp_path: Path, draw: random.Random, expected: Undisturbed, flags: tuple[str, ...] = QUICK_RUN
) -> str:
    """Kill a process at a random moment once config.toml exists, restart and compare; return what happened.

    Every third moment is during the write of a checkpoint, if one follows.
    """
    with running_job(3, *flags, cwd=tmp_path) as job:
        wait_for_file(tmp_path / "run" / "config.toml", job)
        time.sleep(draw.uniform(0, expected.seconds))
        writing = draw.random() < 1 / 3 and wait_for_a_write(tmp_path / "run" / "checkpoints", job)
        ranks = list(rank_processes(job.pid).values())
        what = draw.choice(["rank", "rank", "mpirun", "all"])
        victims = {"rank": ranks and [draw.choice(ranks)], "mpirun": [job.pid], "all": ranks}[what]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if what != "mpirun":
            launcher.wait_for_end(job, 60)  # the launcher notices by itself
    for path in checkpoint.restart_points(tmp_path / "run" / "checkpoints"):
        checkpoint.verify(path)  # whatever has a checkpoint's name is whole
    output = run_to_end(draw.choice([1, 2, 4]), "restart", "run", cwd=tmp_path)
    assert digest(tmp_path / "run", 6) == expected.digest, output
    rows = launcher.read_metrics(tmp_path / "run")
    assert [row["round"] for row in rows] == list(range(1, 7)) and None not in rows[-1]["clients"]["accuracy"]
    return what + (" while writing" if writing else "")


def wait_for_a_write(folder: Path, job: subprocess.Popen[str]) -> bool:
    """Return whether a partial checkpoint appeared before the job ended."""
    while job.poll() is None:
        if any(name.startswith(".round-") for name in os.listdir(folder)):
            return True
    return False


def survive_one(
    folder: Path, trial: int, draw: random.Random, plain: Undisturbed, spilling: Undisturbed
) -> str:
    """Kill and restart a run; every tenth is one whose vectors are on the disk."""
    (folder / str(trial)).mkdir()
    if trial % 10 == 9:
        return survive(folder / str(trial), draw, spilling, SPILLING_RUN)
    return survive(folder / str(trial), draw, plain)


def test_restart_after_a_kill_gives_the_same_bits(
    tmp_path: Path, undisturbed: Undisturbed, undisturbed_spilling: Undisturbed
) -> None:
    for trial, draw in kills(10):
        survive_one(tmp_path, trial, draw, undisturbed, undisturbed_spilling)


@pytest.mark.campaign
@pytest.mark.timeout(7200)
def test_restarts_after_many_kills_give_the_same_bits(
    tmp_path: Path, undisturbed: Undisturbed, undisturbed_spilling: Undisturbed
) -> None:
    count: dict[str, int] = {}
    for trial, draw in kills(100):
        what = survive_one(tmp_path, trial, draw, undisturbed, undisturbed_spilling)
        count[what] = count.get(what, 0) + 1
    print(count)


LONG_ROUNDS = (*QUICK_RUN, "--train.epochs", "12", "--rounds", "2")


@pytest.fixture(scope="module")
def two_long_rounds(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of an undisturbed run with rounds long enough to stop in."""
    folder = tmp_path_factory.mktemp("long")
    run_to_end(2, *LONG_ROUNDS, cwd=folder)
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
def test_signal_to_mpirun_stops_the_round_with_75(
    tmp_path: Path, two_long_rounds: str, family: str, number: signal.Signals
) -> None:
    """mpirun passes the signal on; the run stops within the round, and the restart repeats the bits."""
    with running_job(2, *LONG_ROUNDS, cwd=tmp_path, mpi=family) as job:
        wait_for_file(tmp_path / "run" / "metrics.jsonl", job)
        job.send_signal(number)
        result = launcher.wait_for_end(job, 60)
    assert result.code == 75, result.out + result.err
    newest = checkpoint.newest_first(tmp_path / "run" / "checkpoints")[0]
    assert newest.name in {"round-000001.h5", "round-000002-partial.h5"}
    run_to_end(3, "restart", "run", cwd=tmp_path)
    assert digest(tmp_path / "run", 2) == two_long_rounds


@pytest.mark.parametrize("moment", ["config.toml", "events.jsonl"])
def test_stalled_rank_ends_the_job(tmp_path: Path, moment: str) -> None:
    """run.timeout applies before the first round and in it, where the rank is named."""
    with running_job(2, *LONG_ROUNDS, "--run.timeout", "3", cwd=tmp_path) as job:
        wait_for_file(tmp_path / "run" / moment, job)
        os.kill(rank_processes(job.pid)[1], signal.SIGSTOP)
        result = launcher.wait_for_end(job, 90)
    assert result.code not in {0, 2, 75}
    named = "rank 1 did not reach" in result.err and "within 3 s" in result.err
    within = "did not end within 3 s" in result.err  # stopped inside an exchange, where all had arrived
    assert named or (within and moment == "config.toml"), result.err


def test_restart_falls_back_from_a_damaged_checkpoint(tmp_path: Path, undisturbed: Undisturbed) -> None:
    run = Path(shutil.copytree(undisturbed.run, tmp_path / "run"))
    newest = run / "checkpoints" / "round-000006.h5"
    (run / "checkpoints" / "best.h5").unlink()
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    output = run_to_end(1, "restart", "run", cwd=tmp_path)
    assert "warning" in output and "damaged" in output
    assert digest(run, 6) == undisturbed.digest


# The README's first command, real data


@pytest.fixture(scope="module")
def readme_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the run folder and the output of the README's first command, on 16 ranks."""
    line = re.search(
        r"^ *python -m venv .*'\.\[mpich\]' && (mpirun .*)$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert line, "the README does not print the command"
    mpirun, n, ranks, *rest = shlex.split(line[1])
    assert (mpirun, n, ranks, rest) == ("mpirun", "-n", "16", ["python", "-m", "pfedmoe_mpi"])
    folder = tmp_path_factory.mktemp("readme")
    output = run_to_end(16, cwd=folder, timeout=400)
    (run,) = (folder / "runs").iterdir()
    return run, output


def test_first_readme_command_trains(readme_run: tuple[Path, str]) -> None:
    folder, output = readme_run
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["accuracy"]["mean"] > 0.5, "ten digits, a few of them per client: chance is about 0.2"
    assert rows[-1]["accuracy"]["mean"] > rows[0]["accuracy"]["mean"] and "clients after round" in output
    assert len(list((folder / "log").iterdir())) == 16


def test_cifar10_trains_from_images(tmp_path: Path) -> None:
    with tarfile.open(shared_data("cifar10-images.tar")) as archive:
        archive.extractall(tmp_path / "cifar", filter="data")
    (images,) = {path.parent for path in (tmp_path / "cifar").glob("**/train")}
    source = ("--data.source", "folder", "--data.path", str(images), "--partition.kind", "pathological")
    few = ("--clients", "10", "--participation", "0.2", "--rounds", "3", "--eval.every", "3")
    steps = ("--train.batch", "128", "--train.epochs", "3", "--train.augment", "flip,erase,crop")
    run_to_end(2, *source, *few, *steps, "--run.dir", "run", cwd=tmp_path)
    rows = launcher.read_metrics(tmp_path / "run")
    assert rows[-1]["accuracy_cohort"]["mean"] > 0.6, "two classes per client: chance is 0.5"
    assert sum(rows[-1]["clients"]["samples"]) == 48_000


def test_mnist_trains_on_20_natural_clients(tmp_path: Path) -> None:
    run_to_end(
        *(2, "--data.source", "npz", "--data.path", str(shared_data("mnist-20clients")), "--clients", "20"),
        *("--partition.kind", "natural", "--model.pool", "mnist1,mnist2,mnist3,mnist4,mnist5"),
        *("--model.shared", "mnist5", "--rounds", "2", "--run.dir", "run", "--participation", "0.5"),
        cwd=tmp_path,
    )
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["accuracy_cohort"]["weighted"] > 0.7
