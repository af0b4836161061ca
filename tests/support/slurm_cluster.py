"""A Slurm of two virtual nodes on this machine, in one folder: configuration, key, sockets, spool, logs.

It needs Debian's `slurm-wlm` and `munge`, and root. A Slurm of the system is neither needed nor touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from support import launcher

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
SYSTEM = f"/usr/sbin{os.pathsep}/sbin"  # where Debian keeps daemons, also for users without it in PATH

# Both nodes are this host, on ports of their own. No cgroups and no task binding: a container has neither.
# MPICH under srun names shared memory after job and step, so numbers are not those of another cluster's jobs.
# A requeued job waits until its credential has expired, two minutes if cred_expire does not say otherwise.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={controller}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000,batch_sched_delay=0
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=0
KillWait=20
OverTimeLimit=0
MinJobAge=600
FirstJobId={first}
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=32 RealMemory=64000 Gres=gpu:4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=32 RealMemory=64000 Gres=gpu:4
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def wait_until(condition: Callable[[], Any], seconds: float, what: Callable[[], str]) -> Any:
    """Return the condition's value once it is true; after `seconds` fail the test with the text of `what`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:g} s: {what()}")
        time.sleep(0.05)
    return value


class Cluster:
    """Slurm's daemons as children of this process, and its commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []

    # The daemons

    def start(self) -> None:
        """Start the daemons and wait for two idle nodes."""
        names = ("controller", "n1", "n2")
        host = socket.gethostname().partition(".")[0]
        ports = dict(zip(names, _free_ports(3), strict=True))
        first = 1000 + secrets.randbelow(60_000_000)  # a run in this process may have seeded `random`
        text = CONFIGURATION.format(folder=self.folder, host=host, first=first, **ports)
        (self.folder / "slurm.conf").write_text(text)
        for number in range(4):  # GPUs that nobody opens
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"NodeName=n1,n2 Name=gpu File={self.folder}/gpu[0-3]\n")
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        files = [f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("key", "log", "pid", "seed")]
        self._daemon("munged", "-F", "-f", f"--socket={self.folder}/munge.socket", *files)
        wait_until((self.folder / "munge.socket").exists, 20, self._logs)
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        wait_until(lambda: self._nodes() == ["idle", "idle"], 60, self._logs)

    def _nodes(self) -> list[str]:
        return self.ask("sinfo", "-h", "-N", "-o", "%T", check=False).split()

    def _daemon(self, *command: str) -> None:
        with open(self.folder / "daemons.txt", "ab") as said:
            self._daemons.append(
                subprocess.Popen(
                    [_found(command[0]) or command[0], *command[1:]],
                    cwd=self.folder,
                    env=self.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    start_new_session=True,
                )
            )

    def stop(self) -> None:
        """Kill the daemons and the processes of their jobs, which are no longer their children."""
        while self._daemons:
            daemon = self._daemons.pop()
            launcher.kill_tree(daemon.pid)
            daemon.wait()
        while left := self.processes():
            for pid in left:
                launcher.kill_tree(pid)
            time.sleep(0.05)

    def processes(self) -> list[int]:
        """Return the cluster's processes: slurmstepd runs in its folder, jobs have its SLURM_CONF."""
        wanted = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                own = wanted in (process / "environ").read_bytes().split(b"\0")
                if own or (process / "cwd").readlink() == self.folder:
                    found.append(int(process.name))
        return [pid for pid in found if pid != os.getpid()]

    def _logs(self) -> str:
        logs = [self.folder / "daemons.txt", *self.folder.glob("*.log")]
        return "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in logs if log.exists())

    # Slurm's commands

    def environment(self, extra: dict[str, str] | None = None, mpi: str = "mpich") -> dict[str, str]:
        """Return the environment with this cluster, and this Python's programs first in PATH."""
        clean = launcher.clean_environment(mpi, {})
        path = [*([str(Path(sys.executable).parent)] if mpi == "mpich" else []), clean["PATH"], SYSTEM]
        if mpi != "mpich":
            path.insert(1, str(Path(sys.executable).parent))
        here = {"SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": os.pathsep.join(path)}
        return {**clean, **here, **(extra or {})}

    def ask(self, *command: str, check: bool = True) -> str:
        """Return the output of a Slurm command."""
        result = subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, timeout=30, check=False
        )
        assert result.returncode == 0 or not check, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def submit(
        self,
        *arguments: str | Path,
        cwd: Path,
        options: Sequence[str] = (),
        env: dict[str, str] | None = None,
        mpi: str = "mpich",
    ) -> str:
        """Submit `sbatch -A X -p Y OPTIONS SCRIPT ARGUMENTS` and return the job's number."""
        command = ["sbatch", "--parsable", "-A", "any", "-p", "main", *options, *map(str, arguments)]
        result = subprocess.run(
            command,
            cwd=cwd,
            env=self.environment(env, mpi),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        """Return scontrol's fields of a job: JobState, ExitCode, Restarts, NodeList and so on."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.ask("scontrol", "show", "--oneliner", "job", job)))

    def over(self, job: str, seconds: float = 120) -> dict[str, str]:
        """Wait until a job has ended and is not requeued; return its fields."""

        def done() -> dict[str, str] | None:
            facts = self.facts(job)
            return None if facts["JobState"] in {"PENDING", "RUNNING", "COMPLETING", "REQUEUED"} else facts

        return wait_until(
            done, seconds, lambda: f"the end of job {job}: {self.facts(job)}\n{self.output(job)}"
        )

    def output(self, job: str) -> str:
        """Return what a job has printed so far."""
        path = Path(self.facts(job)["StdOut"])
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def job_processes(self, job: str) -> dict[int, list[str]]:
        """Return {process id: command line} of a job, Slurm's own processes first."""
        own, others = {}, {}
        for pid in self.processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                if words[0].startswith(f"slurmstepd: [{job}."):
                    own[pid] = words
                elif f"SLURM_JOB_ID={job}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    others[pid] = words
        return {**own, **others}

    def ranks(self, job: str) -> list[int]:
        """Return the process ids of the program in a job, without launchers."""
        return [pid for pid, words in self.job_processes(job).items() if words[1:3] == ["-m", "pfedmoe_mpi"]]


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _found(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}{os.pathsep}{SYSTEM}")


def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Run a cluster in `folder` and always stop it; without the packages skip the test, or fail it in CI."""
    missing = [program for program in PROGRAMS if not _found(program)]
    reason = f"no {', '.join(missing)}: apt-get install slurm-wlm munge" if missing else ""
    reason = reason or ("a Slurm for tests needs root" if os.geteuid() else "")
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    cluster = Cluster(folder.resolve())
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def signal_is_pending(pid: int, number: signal.Signals) -> bool:
    """Return whether a signal is pending for a stopped process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return any(int(mask, 16) >> (number - 1) & 1 for mask in re.findall(r"(?:Sig|Shd)Pnd:\s*(\w+)", status))
