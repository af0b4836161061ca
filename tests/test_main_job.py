"""The main job as a user runs it: real mpirun, real kills, real restarts, real data."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pfedmoe_mpi import checkpoint, inspection
from pfedmoe_mpi.checkpoint import Checkpoint

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
MPIRUN = Path(sys.executable).parent / "mpirun"
QUICK = (
    *("--clients", "6", "--rounds", "6", "--model.pool", "mlp4,mlp5", "--model.shared", "mlp5"),
    *("--run.checkpoint_every", "1", "--train.epochs", "2", "--run.dir", "run"),
)


class Job:
    """A running `mpirun -n N python -m pfedmoe_mpi ...`, killed with all it started when the block ends."""

    def __init__(self, ranks: int, *arguments: str, cwd: Path, launch: tuple[str, ...] = ()) -> None:
        command = [*(launch or (str(MPIRUN),)), "-n", str(ranks), sys.executable, "-m", "pfedmoe_mpi", *arguments]
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_everything()

    def kill_everything(self) -> None:
        for pid in [*self.ranks(), self.process.pid]:
            _kill(pid)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def ranks(self) -> list[int]:
        """The processes of the program below mpirun, by /proc."""
        children: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
        found, below = [], [self.process.pid]
        while below:
            pid = below.pop()
            below += children.get(pid, [])
            if pid != self.process.pid and "pfedmoe_mpi" in _command(pid):
                found.append(pid)
        return [pid for pid in found if "mpirun" not in _command(pid) and "hydra" not in _command(pid)]

    def end(self, timeout: float) -> tuple[int, str]:
        """Exit code and output."""
        try:
            output, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill_everything()
            pytest.fail(f"no end within {timeout} s: {self.process.args}\n{self.process.communicate()[0]}")
        return self.process.returncode, output


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def finished(ranks: int, *arguments: str, cwd: Path, timeout: float = 240) -> str:
    """The output of a job that must end well."""
    with Job(ranks, *arguments, cwd=cwd) as job:
        code, output = job.end(timeout)
    assert code == 0, output
    return output


def digest(folder: Path, round: int) -> str:
    path = folder / "checkpoints" / checkpoint.name(round, partial=False)
    checkpoint.verify(path)
    with Checkpoint(path) as loaded:
        return inspection.digest(loaded)


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
def test_open_mpi_gives_the_same_bits(tmp_path: Path, program) -> None:  # type: ignore[no-untyped-def]
    finished(2, *QUICK, cwd=tmp_path)
    result = program(4, *QUICK, "--run.dir", "open", mpi="openmpi", timeout=240, cwd=tmp_path)
    assert result.rc == 0, result.stdout + result.stderr
    assert digest(tmp_path / "open", 6) == digest(tmp_path / "run", 6)


# Interruptions


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """(digest, seconds from config.toml to the end) of the quick run on two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Job(2, *QUICK, cwd=folder) as job:
        wait_for(folder / "run" / "config.toml", job)
        started = time.monotonic()
        code, output = job.end(240)
    assert code == 0, output
    return digest(folder / "run", 6), time.monotonic() - started


def wait_for(path: Path, job: Job, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        assert job.process.poll() is None, job.end(10)[1]
        time.sleep(0.01)


def kills(number: int) -> Iterator[tuple[int, random.Random]]:
    seed = int(os.environ.get("PFEDMOE_KILL_SEED") or random.randrange(10**6))
    print(f"PFEDMOE_KILL_SEED={seed}")
    for trial in range(number):
        yield trial, random.Random(seed * 1000 + trial)


def survive(tmp_path: Path, draw: random.Random, expected: tuple[str, float]) -> str:
    """Kill something at a random moment once config.toml exists, restart, compare; what happened."""
    wanted, seconds = expected
    with Job(3, *QUICK, cwd=tmp_path) as job:
        wait_for(tmp_path / "run" / "config.toml", job)
        time.sleep(draw.uniform(0, seconds))
        ranks = job.ranks()
        what = draw.choice(["rank", "rank", "mpirun", "all"])
        victims = {"rank": ranks and [draw.choice(ranks)], "mpirun": [job.process.pid], "all": ranks}[what]
        for pid in victims:
            _kill(pid)
        if what != "mpirun":
            job.end(60)  # the launcher notices by itself
    for path in checkpoint.newest_first(tmp_path / "run" / "checkpoints"):
        checkpoint.verify(path)  # whatever has a checkpoint's name is whole
    output = finished(draw.choice([1, 2, 4]), "restart", "run", cwd=tmp_path)
    assert digest(tmp_path / "run", 6) == wanted, output
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == list(range(1, 7))
    return what


def test_kill_at_any_moment_and_restart(tmp_path: Path, undisturbed: tuple[str, float]) -> None:
    for trial, draw in kills(5):
        (tmp_path / str(trial)).mkdir()
        survive(tmp_path / str(trial), draw, undisturbed)


@pytest.mark.campaign
@pytest.mark.timeout(7200)
def test_kill_campaign(tmp_path: Path, undisturbed: tuple[str, float]) -> None:
    count: dict[str, int] = {}
    for trial, draw in kills(50):
        (tmp_path / str(trial)).mkdir()
        what = survive(tmp_path / str(trial), draw, undisturbed)
        count[what] = count.get(what, 0) + 1
    print(count)


@pytest.mark.parametrize("family", ["mpich", pytest.param("openmpi", marks=pytest.mark.openmpi)])
def test_usr1_stops_in_the_round_with_75(
    tmp_path: Path, undisturbed: tuple[str, float], family: str, launchers
) -> None:  # type: ignore[no-untyped-def]
    """mpirun passes SIGUSR1 on; the run stops within the round, and the restart repeats the bits."""
    command, environment = launchers(family)
    longer = (*QUICK, "--train.epochs", "40", "--rounds", "2")
    plain = finished(2, *longer, "--run.dir", "whole", cwd=tmp_path)
    assert "round 2/2" in plain
    job = subprocess.Popen(
        [*command, "-n", "2", sys.executable, "-m", "pfedmoe_mpi", *longer],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text()):
            assert time.monotonic() < deadline and job.poll() is None, "no first round"
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        output, _ = job.communicate(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 75, output
    newest = checkpoint.newest_first(tmp_path / "run" / "checkpoints")[0]
    assert newest.name in {"round-000001.h5", "round-000002-partial.h5"}
    finished(3, "restart", "run", cwd=tmp_path)
    assert digest(tmp_path / "run", 2) == digest(tmp_path / "whole", 2)


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


# The README's first command, real data, memory


def test_first_command_of_the_readme(tmp_path: Path) -> None:
    line = re.search(r"^ *python -m venv .*'\.\[mpich\]' && (mpirun .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert line, "the README does not print the command"
    mpirun, n, ranks, *rest = shlex.split(line[1])
    assert (mpirun, n, ranks, rest) == ("mpirun", "-n", "16", ["python", "-m", "pfedmoe_mpi"])
    output = finished(16, cwd=tmp_path, timeout=400)
    (folder,) = (tmp_path / "runs").iterdir()
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["accuracy"]["mean"] > 0.5, "ten digits, a few of them per client: chance is about 0.2"
    assert rows[-1]["accuracy"]["mean"] > rows[0]["accuracy"]["mean"] and "clients after round" in output
    assert len(list((folder / "log").iterdir())) == 16


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"shared/data/{name} is not here")
    return SHARED / name


def test_cifar10_trains_from_its_images(tmp_path: Path) -> None:
    with tarfile.open(shared("cifar10-images.tar")) as archive:
        archive.extractall(tmp_path / "cifar", filter="data")
    (images,) = {path.parent for path in (tmp_path / "cifar").glob("**/train")}
    finished(
        *(2, "--data.source", "folder", "--data.path", str(images), "--clients", "10", "--participation", "0.2"),
        *("--partition.kind", "pathological", "--train.batch", "128", "--rounds", "2", "--run.dir", "run"),
        *("--train.augment", "flip,erase,crop", "--eval.every", "2"),
        cwd=tmp_path,
    )
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["accuracy_cohort"]["mean"] > 0.6, "two classes per client: chance is 0.5"
    assert sum(rows[-1]["clients"]["samples"]) == 48_000


def test_mnist_of_20_natural_clients(tmp_path: Path) -> None:
    finished(
        *(2, "--data.source", "npz", "--data.path", str(shared("mnist-20clients")), "--clients", "20"),
        *("--partition.kind", "natural", "--model.pool", "mnist1,mnist2,mnist3,mnist4,mnist5"),
        *("--model.shared", "mnist5", "--rounds", "2", "--run.dir", "run", "--participation", "0.5"),
        cwd=tmp_path,
    )
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["accuracy_cohort"]["weighted"] > 0.7


def growth(tmp_path: Path, rounds: int) -> float:
    """MiB by which the largest rank grows over the second half of a run."""
    finished(2, *QUICK, "--rounds", str(rounds), "--run.checkpoint_every", "20", cwd=tmp_path, timeout=1200)
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    return float(rows[-1]["rss_mb"] - rows[rounds // 2]["rss_mb"])


def test_memory_does_not_grow(tmp_path: Path) -> None:
    assert growth(tmp_path, 60) < 10


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_over_200_rounds(tmp_path: Path) -> None:
    assert growth(tmp_path, 200) < 10
