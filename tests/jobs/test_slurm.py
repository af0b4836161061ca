"""The job scripts in a real Slurm: allocations lost in every way, and the same bits at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from support import launcher, slurm_cluster
from support.paths import JOBS
from support.slurm_cluster import Cluster, wait_until

pytestmark = pytest.mark.slurm

MODEL = ("--model.pool", "mlp5", "--model.shared", "mlp5", "--train.device", "cpu")
# Ten rounds of a good half second, from data of CIFAR's shape: long enough to be disturbed in the middle.
STEADY = (
    *(JOBS / "cifar10.toml", "--data.path", "tiny.h5", "--clients", "4", *MODEL),
    *("--rounds", "10", "--train.epochs", "3", "--train.batch", "16", "--run.checkpoint_every", "4"),
)
ENDLESS = (*MODEL, "--clients", "4", "--rounds", "100000", "--run.checkpoint_every", "100000")
TWO = "--ntasks=2"
SRUN = {"LAUNCH": "srun --mpi=pmi2"}
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from slurm_cluster.running_cluster(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, session: launcher.Session) -> Path:
    """The folder where jobs are submitted; tiny.h5 is prepared as jobs/cifar10.toml says for real data."""
    folder = tmp_path_factory.mktemp("work")
    data = ("--data.source", "synthetic", "--data.samples", "800", "--data.size", "32")
    result = session("data", "prepare", "tiny.h5", *data, cwd=folder)
    assert result.code == 0, result.err
    return folder


@pytest.fixture(scope="module")
def undisturbed(work: Path, session: launcher.Session) -> str:
    """The digest of the steady run, outside of Slurm."""
    result = launcher.run_program(2, *map(str, STEADY), "--run.dir", "undisturbed", cwd=work)
    assert result.code == 0, result.out + result.err
    return digest(session, work / "undisturbed")


def digest(session: launcher.Session, run: Path) -> str:
    """Return `inspect --digest` of the last of the ten rounds."""
    result = session("inspect", "--digest", "checkpoints/round-000010.h5", cwd=run)
    assert result.code == 0, result.err
    return result.out


@pytest.fixture(scope="module")
def one_minute(cluster: Cluster, work: Path) -> str:
    """A job with Slurm's shortest time limit and no signal; the other tests run at the same time."""
    command = f"nice mpirun -n 1 python -m pfedmoe_mpi {' '.join(ENDLESS)} --run.dir runs/minute"
    return cluster.submit(cwd=work, options=["--time=1", "--ntasks=1", "--nodelist=n2", "--wrap", command])


@pytest.fixture(scope="module")
def half_started(cluster: Cluster, work: Path) -> str:
    """A job whose rank 1 ends before it knows of MPI, as on a node without the package; rank 0 waits."""
    program = work / "missing" / "python"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\n[ "$SLURM_PROCID" = 1 ] && exit 1\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    env = {**SRUN, "PATH": f"{program.parent}:{cluster.environment()['PATH']}"}
    return cluster.submit(JOBS / "train.slurm", *STEADY, cwd=work, options=[TWO], env=env)


def started(run: Path, starts: int = 1, rounds: int = 1) -> None:
    """Wait until the run has started `starts` times and done `rounds` rounds since the last start."""

    def going() -> bool:
        if not (run / "events.jsonl").exists():
            return False
        begun = [e for e in launcher.read_events(run) if e["event"] in {"start", "restart"}]
        done = len(launcher.read_metrics(run)) if (run / "metrics.jsonl").exists() else 0
        return len(begun) >= starts and done >= begun[-1].get("round", 0) + rounds

    files = (run / "events.jsonl", run / "metrics.jsonl", run.parents[1] / f"{run.name}.txt")
    wait_until(
        going, 240, lambda: "\n".join(f.read_text()[-2000:] for f in files if f.exists()) or f"no {run}"
    )


def kinds(run: Path) -> list[str]:
    """Return the kinds of a run's events, in order."""
    return [event["event"] for event in launcher.read_events(run)]


def last_event(cluster: Cluster, job: str) -> Any:
    """Return the last line of a job's output, which must be the run folder's last event."""
    return json.loads(cluster.output(job).splitlines()[-1])


# Allocations that are lost


def test_requeue_survives_time_limit_preemption_and_lost_node(
    cluster: Cluster, work: Path, undisturbed: str, session: launcher.Session
) -> None:
    """Three starts end by Slurm's warning, by `scontrol requeue` and with their node; the fourth finishes."""
    options = [TWO, "--time=1", "--signal=B:USR1@20"]
    job = cluster.submit(JOBS / "requeue.slurm", *STEADY, cwd=work, options=options)
    run = work / "runs" / f"requeue-{job}"

    started(run)
    ranks = cluster.ranks(job)  # deaf until the warning is there: the run cannot end before it
    assert len(ranks) == 2
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    wait_until(
        lambda: all(slurm_cluster.signal_is_pending(pid, signal.SIGUSR1) for pid in ranks),
        60,
        lambda: "no warning",
    )
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)

    started(run, starts=2)
    assert cluster.facts(job)["Restarts"] == "1"
    assert kinds(run) == ["start", "stop", "restart"]
    cluster.ask("scontrol", "update", f"jobid={job}", "timelimit=10")  # the next starts end otherwise
    cluster.ask("scontrol", "requeue", job)

    started(run, starts=3)
    assert kinds(run)[3:] == ["stop", "restart"], "requeued once, with a checkpoint"
    node = kill_outright(cluster, job)
    facts = cluster.over(job)
    cluster.ask("scontrol", "update", f"nodename={node}", "state=resume")
    said = cluster.output(job)
    assert facts["JobState"] == "COMPLETED" and facts["Restarts"] == "3", said
    assert facts["NodeList"] != node, "it went on elsewhere"
    assert last_event(cluster, job)["event"] == "finish" and "start 4: exit code 0" in said
    assert kinds(run)[5:] == ["restart", "finish"], "a killed start records no event"
    assert digest(session, run) == undisturbed


def test_requeue_under_srun_survives_a_kill_on_the_same_node(
    cluster: Cluster, work: Path, undisturbed: str, session: launcher.Session
) -> None:
    """A requeued job keeps its number, by which MPICH finds what the killed ranks left in /dev/shm."""
    options = [TWO, "--nodelist=n1"]
    job = cluster.submit(JOBS / "requeue.slurm", *STEADY, cwd=work, options=options, env=SRUN)
    run = work / "runs" / f"requeue-{job}"
    started(run, rounds=5)  # a checkpoint is written every four
    node = kill_outright(cluster, job)
    cluster.ask("scontrol", "update", f"nodename={node}", "state=resume")
    facts = cluster.over(job)
    assert facts["ExitCode"] == "0:0" and facts["Restarts"] == "1", cluster.output(job)
    assert kinds(run) == ["start", "restart", "finish"]
    assert digest(session, run) == undisturbed


def kill_outright(cluster: Cluster, job: str) -> str:
    """Kill all processes of a job and set its node down; return the node."""
    node = cluster.facts(job)["NodeList"]
    for pid in cluster.job_processes(job):
        os.kill(pid, signal.SIGKILL)
    cluster.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    return node


@pytest.mark.usefixtures("one_minute", "half_started")  # from here on: no node is taken down any more
def test_only_a_stopped_run_is_requeued(cluster: Cluster, work: Path) -> None:
    script = JOBS / "requeue.slurm"
    wrong = cluster.submit(script, JOBS / "digits.toml", "--rounds", "0", cwd=work, options=[TWO])
    cancelled = cluster.submit(script, *ENDLESS, cwd=work, options=[TWO])
    facts = cluster.over(wrong)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0")
    run = work / "runs" / f"requeue-{cancelled}"
    started(run)
    cluster.ask("scancel", cancelled)
    facts = cluster.over(cancelled)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    assert launcher.read_events(run)[-1]["event"] == "stop", "with a checkpoint all the same"
    assert "exit code 75" in cluster.output(cancelled)
    assert list((run / "checkpoints").glob("round-*.h5"))


@pytest.mark.parametrize("launch", ["mpirun", "srun", pytest.param("openmpi", marks=pytest.mark.openmpi)])
def test_train_script_stops_and_resumes(
    cluster: Cluster, work: Path, undisturbed: str, session: launcher.Session, launch: str
) -> None:
    """TERM and USR1 to the batch shell, again and again while the checkpoint is written; then another job."""
    env = {"mpirun": {}, "srun": SRUN, "openmpi": AS_ROOT}[launch]
    mpi = "openmpi" if launch == "openmpi" else "mpich"
    job = cluster.submit(JOBS / "train.slurm", *STEADY, cwd=work, options=[TWO], env=env, mpi=mpi)
    run = work / "runs" / f"train-{job}"
    started(run)
    for name in ("TERM", "USR1", "TERM", "USR1"):
        cluster.ask("scancel", "--batch", f"--signal={name}", job, check=False)
    facts = cluster.over(job)
    said = cluster.output(job)
    assert facts["ExitCode"] == "75:0" and "exit code 75" in said, said
    assert last_event(cluster, job)["event"] == "stop" == launcher.read_events(run)[-1]["event"]

    env = {**env, "RUN_DIR": f"runs/train-{job}"}
    again = cluster.submit(JOBS / "train.slurm", cwd=work, options=["--ntasks=1"], env=env, mpi=mpi)
    assert cluster.over(again)["ExitCode"] == "0:0", cluster.output(again)
    assert last_event(cluster, again)["event"] == "finish"
    assert digest(session, run) == undisturbed


# What else the scripts promise


def test_array_script_trains_seeds_by_algorithms(cluster: Cluster, work: Path) -> None:
    flags = (JOBS / "digits.toml", *MODEL[4:], "--clients", "2", "--rounds", "1", "--model.pool", "mlp5,mlp4")
    options = [TWO, "--array=0,4"]
    job = cluster.submit(JOBS / "array.slurm", *flags, "--model.shared", "mlp5", cwd=work, options=options)
    for task, algorithm, seed in ((0, "pfedmoe", 0), (4, "standalone", 1)):
        facts = cluster.over(f"{job}_{task}")
        said = Path(facts["StdOut"]).read_text(encoding="utf-8")
        assert facts["ExitCode"] == "0:0", said
        assert json.loads(said.splitlines()[-1])["event"] == "finish"
        run = work / "runs" / f"array-{job}" / f"{algorithm}-{seed}"
        settings = tomllib.loads((run / "config.toml").read_text())
        assert (settings["algorithm"], settings["seed"]) == (algorithm, seed)


def test_table_script_runs_one_run_per_task(cluster: Cluster, work: Path) -> None:
    (work / "table.toml").write_text(
        '[base]\nrounds = 1\nclients = 2\nmodel.pool = ["mlp5"]\nmodel.shared = "mlp5"\n'
        '[axis]\nalgorithm = ["standalone", "pfedmoe"]\nseed = [0, 1]\n'
    )
    options = [TWO, "--array=1,2%1"]
    job = cluster.submit(JOBS / "table.slurm", "table.toml", *MODEL[4:], cwd=work, options=options)
    for task, name in ((1, "standalone-seed1"), (2, "pfedmoe-seed0")):
        facts = cluster.over(f"{job}_{task}")
        said = Path(facts["StdOut"]).read_text(encoding="utf-8")
        assert facts["ExitCode"] == "0:0", said
        assert (facts["MinMemoryCPU"], facts["ArrayTaskThrottle"]) == ("2G", "1")
        assert json.loads(said.splitlines()[-1])["event"] == "finish"
        settings = tomllib.loads((work / "runs" / f"table-{job}" / name / "config.toml").read_text())
        assert settings["run"]["cell"] == f"/{name.partition('-')[0]}"
    assert len(list((work / "runs" / f"table-{job}").iterdir())) == 2


SHARED = {"SLURM_MPI_TYPE": "pmi2", "RANKS_PER_GPU": "2", "MPS": "1"}


@pytest.mark.parametrize(("nodes", "env"), [(1, SHARED), (2, {"LAUNCH": "mpirun -n 2 -ppn 1 -bind-to core"})])
def test_gpu_script_on_shared_gpus_and_on_two_nodes(
    cluster: Cluster, work: Path, undisturbed: str, session: launcher.Session, nodes: int, env: dict[str, str]
) -> None:
    """Only Slurm uses the nodes' GPUs; the ranks train on CPUs, and a script stands in for MPS's daemon."""
    daemon = work / "bin" / "nvidia-cuda-mps-control"
    daemon.parent.mkdir(exist_ok=True)
    daemon.write_text(f'#!/bin/bash\necho "$1 $CUDA_MPS_PIPE_DIRECTORY" >>{work}/mps.txt\nexec sleep 600\n')
    daemon.chmod(0o755)
    env = {**env, "PATH": f"{daemon.parent}:{os.environ['PATH']}"}
    options = [f"--nodes={nodes}", "--ntasks-per-node=1"]
    job = cluster.submit(JOBS / "gpu.slurm", *STEADY, cwd=work, options=options, env=env)
    facts = cluster.over(job)
    said = cluster.output(job)
    assert facts["ExitCode"] == "0:0", said
    assert facts["NumNodes"] == str(nodes) and facts["TresPerNode"].endswith("gpu:4"), facts
    assert last_event(cluster, job)["event"] == "finish"
    run = work / "runs" / f"gpu-{job}"
    assert launcher.read_events(run)[0]["ranks"] == 2
    if "MPS" in env:
        assert (work / "mps.txt").read_text() == f"-f /tmp/mps-{job}\n"
        Path(f"/tmp/mps-{job}").rmdir()
    assert digest(session, run) == undisturbed


# The program in an allocation


def test_job_stops_before_its_time_limit(cluster: Cluster, work: Path, one_minute: str) -> None:
    facts = cluster.over(one_minute, 100)
    said = cluster.output(one_minute)
    assert facts["ExitCode"] == "75:0" and facts["JobState"] == "FAILED", f"{facts}\n{said}"
    lived = datetime.fromisoformat(facts["EndTime"]) - datetime.fromisoformat(facts["StartTime"])
    assert 40 <= lived.total_seconds() <= 60, lived
    stop = launcher.read_events(work / "runs" / "minute")[-1]
    assert stop["event"] == "stop" and "time" in str(stop.get("by", "")), stop
    assert list((work / "runs" / "minute" / "checkpoints").glob("round-*.h5"))


def test_rank_that_cannot_start_ends_the_job(cluster: Cluster, work: Path, half_started: str) -> None:
    facts = cluster.over(half_started, 100)
    said = cluster.output(half_started)
    assert facts["JobState"] == "FAILED" and "task 1: Exited with exit code 1" in said, said
    lived = datetime.fromisoformat(facts["EndTime"]) - datetime.fromisoformat(facts["StartTime"])
    assert lived.total_seconds() >= 58, "not by SLURM_WAIT"
    assert not (work / "runs" / f"train-{half_started}").exists()


ALLOCATION = """\
#!/bin/bash
tell() { echo "== $1: $?"; }
python -m pfedmoe_mpi {small} --run.dir plain; tell plain
python -m pfedmoe_mpi inspect plain/checkpoints/best.h5 >/dev/null; tell inspect
mpirun -n 1 python -m pfedmoe_mpi {small} --run.dir one; tell "mpirun -n 1"
mpirun -n 2 python -m pfedmoe_mpi check .; tell check
srun --mpi=none -n 2 python -m pfedmoe_mpi {small} --run.dir none; tell "srun --mpi=none"
srun --mpi=pmi2 -n 2 python -m pfedmoe_mpi check .; tell "srun check"
"""


def test_launchers_work_inside_an_allocation(
    cluster: Cluster, work: Path, small_run: tuple[str, ...]
) -> None:
    """Slurm's variables do not override MPI's values."""
    (work / "allocation.slurm").write_text(ALLOCATION.replace("{small}", " ".join(small_run)))
    env = {"SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
    job = cluster.submit("allocation.slurm", cwd=work, options=[TWO, "--output=allocation.txt"], env=env)
    cluster.over(job)
    said = cluster.output(job)
    codes = dict(line[3:].rsplit(": ", 1) for line in said.splitlines() if line.startswith("== "))
    refused = codes.pop("srun --mpi=none")
    assert refused == "2" and said.count("started 2 ranks, but each believes it is alone") == 1, said
    assert not (work / "none").exists()
    assert codes == dict.fromkeys(("plain", "inspect", "mpirun -n 1", "check", "srun check"), "0"), said
    for rank in (0, 1):
        counted = said.count(f"rank {rank}: local rank {rank} of 2")
        assert counted == 2, "by MPI, not by SLURM_LOCALID\n" + said


@pytest.mark.parametrize("how", ["INT", "TERM", "USR1"])
def test_interrupts_under_srun_stop_the_run(cluster: Cluster, work: Path, tmp_path: Path, how: str) -> None:
    """Ctrl-C, which srun -X passes on at once, and signals to the step."""
    run = tmp_path / "run"
    step = ["srun", "-X", "--mpi=pmi2", TWO, "--partition=main", f"--job-name=stops-{how}"]
    process = subprocess.Popen(
        [*step, "python", "-m", "pfedmoe_mpi", *ENDLESS, "--run.dir", str(run)],
        cwd=tmp_path,
        env=cluster.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        started(run)
        if how == "INT":
            process.send_signal(signal.SIGINT)
        else:
            cluster.ask("scancel", f"--signal={how}", f"--name=stops-{how}")
        begun = time.monotonic()
        result = launcher.wait_for_end(process, 60)
    finally:
        launcher.kill_tree(process.pid)
    assert result.code == 75, result.out + result.err
    assert launcher.read_events(run)[-1]["event"] == "stop" and list((run / "checkpoints").glob("round-*.h5"))
    assert time.monotonic() - begun < 20, "KillWait is 20 s: the ranks were not killed"
