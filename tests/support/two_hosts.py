"""Two hosts on this machine: namespaces of network, host name, mounts and shared memory, joined by a link.

Each host is one process that lives until its standard input ends. So nothing is left behind, however the
tests end: no host, no name outside, no file, no interface.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import launcher
from support.paths import ROOT

NAMES = ("node1", "node2")  # as hostfile.example has them
PROGRAMS = ("unshare", "nsenter", "mount", "ip", "tc")

# Give a host its name, addresses and /dev/shm, then wait.
HOLD = """\
set -e
echo {name} > /proc/sys/kernel/hostname
mount --bind {folder}/hosts /etc/hosts
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
echo up
exec cat
"""
# The launchers call this in place of ssh. As with ssh, the environment and the shell are the other host's.
AGENT = """\
#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
case "$1" in {cases} *) echo "no host $1" >&2; exit 255;; esac
shift
nsenter --target $pid --net --uts --mount --ipc env -i HOME=/root PATH=/usr/bin:/bin sh -c "$*"
code=$?
[ $code -gt 128 ] && exit 255
exit $code
"""


class TwoHosts:
    """The hosts node1 and node2, which share this machine's files; mpirun runs on node1."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._holders: dict[str, subprocess.Popen[str]] = {}
        self.networks: dict[str, str] = {}

    def start(self) -> None:
        lines = [f"10.77.0.{number} {name}" for number, name in enumerate(NAMES, 1)]
        (self._folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        for name in NAMES:
            self._hold(name)
        one, two = (str(self._holders[name].pid) for name in NAMES)
        _call(
            "ip", "link", "add", "eth0", "netns", one, *("type", "veth", "peer", "name", "eth0", "netns", two)
        )
        for number, name in enumerate(NAMES, 1):
            self.call(name, "ip", "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            self.link(name, "up")
        for name in NAMES:
            self._running(name)
        cases = " ".join(f"{name}) pid={self._holders[name].pid};;" for name in NAMES)
        self.agent.write_text(AGENT.format(cases=cases))
        self.agent.chmod(0o755)

    def _running(self, name: str) -> None:
        """Wait until the interface is up: MPI ignores one that is not."""
        deadline = time.monotonic() + 10
        while "state UP" not in self.call(name, "ip", "link", "show", "eth0"):
            if time.monotonic() > deadline:
                raise OSError(f"eth0 of {name} does not come up")
            time.sleep(0.01)

    def _hold(self, name: str) -> None:
        script = HOLD.format(name=name, folder=shlex.quote(str(self._folder)))
        holder = subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "--ipc", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._holders[name] = holder
        assert holder.stdout and holder.stderr
        if holder.stdout.readline() != "up\n":
            raise OSError(holder.stderr.read())
        network = os.readlink(f"/proc/{holder.pid}/ns/net")
        assert network != os.readlink("/proc/self/ns/net"), "all that runs in it will be killed"
        self.networks[name] = network

    @property
    def agent(self) -> Path:
        return self._folder / "agent"

    # What happens on a host

    def enter(self, name: str, folder: Path = Path("/")) -> list[str]:
        """Return the prefix that runs a command on that host, in that folder."""
        holder = str(self._holders[name].pid)
        return ["nsenter", "--target", holder, "--net", "--uts", "--mount", "--ipc", "env", "-C", str(folder)]

    def call(self, name: str, *command: str) -> str:
        """Return a command's output; it must exit with 0."""
        return _call(*self.enter(name), *command)

    def sent(self, name: str) -> int:
        """Return the bytes that left the host, counted by the kernel."""
        table = self.call(name, "cat", "/proc/net/dev")
        (numbers,) = re.findall(r"eth0:(.*)", table)
        return int(numbers.split()[8])

    def processes(self, name: str) -> list[int]:
        """Return all processes on that host except the holder."""
        return [pid for pid in namespace_processes(self.networks[name]) if pid != self._holders[name].pid]

    def kill(self, name: str) -> None:
        """Send SIGKILL to the host's processes until none is left."""
        while left := self.processes(name):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def empty(self, name: str, within: float) -> None:
        """Check that no process is left on the host `within` seconds."""
        deadline = time.monotonic() + within
        while left := self.processes(name):
            assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
            time.sleep(0.1)

    # The link

    def link(self, name: str, state: str) -> None:
        """Set the host's end of the link `up` or `down`."""
        self.call(name, "ip", "link", "set", "eth0", state)

    def rate(self, mbit: int | None) -> None:
        """Limit what each host sends, in Mbit/s; None removes the limit."""
        for name in NAMES:
            if mbit is None:
                self.call(name, "sh", "-c", "tc qdisc del dev eth0 root 2>/dev/null || true")
            else:
                burst = str(max(16_000, mbit * 125))  # bytes at once: a millisecond's, or some packets
                limit = ("rate", f"{mbit}mbit", "burst", burst, "latency", "400ms")
                self.call(name, "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *limit)

    def give_up_early(self) -> None:
        """Let TCP give up after 3 retries instead of 15, which take a quarter of an hour."""
        for name in NAMES:
            self.call(name, "sh", "-c", "echo 3 > /proc/sys/net/ipv4/tcp_retries2")

    # Jobs

    def across(
        self, mpi: str, ranks: int, *arguments: str, cwd: Path, env: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start the command that hostfile.example prints for this MPI, half of the ranks on each host."""
        hostfile, line = hostfile_and_command(mpi, ranks // 2)
        (cwd / "hostfile").write_text(hostfile)
        assert line[-5:] == ["-n", "32", "python", "-m", "pfedmoe_mpi"], line
        line[-4] = str(ranks)
        return self.launch(mpi, [*line, *arguments], cwd=cwd, env=env)

    def launch(
        self, mpi: str, line: list[str], *, cwd: Path, env: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start `mpirun ...` on node1, with the additional flags this machine needs."""
        own = ["-launcher", "ssh", "-launcher-exec", str(self.agent)]
        known = launcher.clean_environment(mpi, env or {})
        beside = [str(Path(sys.executable).parent)]
        if mpi == "openmpi":
            own = ["--mca", "plm_ssh_agent", str(self.agent), "--allow-run-as-root", "--bind-to", "none"]
            own += ["-x", "MPI4PY_MPIABI", "-x", "MPI4PY_LIBMPI"]  # it is not the only MPI here
            beside.insert(0, str(launcher.openmpi_folder() / "bin"))
        known["PATH"] = os.pathsep.join([*beside, known["PATH"]])
        assert line[0] == "mpirun"
        return subprocess.Popen(
            [*self.enter(NAMES[0], cwd), line[0], *own, *line[1:]],
            env=known,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def close(self) -> None:
        """End all processes on the hosts, and thereby the hosts."""
        for name in self.networks:
            self.kill(name)
        for holder in self._holders.values():
            holder.kill()
            holder.communicate()


@contextlib.contextmanager
def running_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Run two hosts; without their requirements skip the test, or fail it in CI."""
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if os.geteuid() or missing:
        _cannot(f"missing: {', '.join(missing)} (apt-get install iproute2)" if missing else "needs root")
    hosts = TwoHosts(folder)
    try:
        try:
            hosts.start()
        except (OSError, subprocess.CalledProcessError) as error:
            _cannot(f"no namespaces: {error} {getattr(error, 'stderr', '')}")
        yield hosts
    finally:
        hosts.close()


def namespace_processes(network: str) -> list[int]:
    """Return the processes in a network namespace."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(folder / "ns" / "net") == network:
                found.append(int(folder.name))
    return found


def _cannot(reason: str) -> None:
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"two hosts: {reason}")


def _call(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


def hostfile_and_command(mpi: str, cores: int) -> tuple[str, list[str]]:
    """Return hostfile.example in this MPI's form, for hosts of that many cores, and the command it prints."""
    text = (ROOT / "hostfile.example").read_text()
    title = {"mpich": "MPICH", "openmpi": "Open MPI"}[mpi]
    (command,) = re.findall(rf"^# {title}: +(mpirun .*)$", text, re.MULTILINE)
    for name in NAMES:
        for family, form in (("mpich", f"{name}:16"), ("openmpi", f"{name} slots=16")):
            line = form.replace("16", str(cores)) if family == mpi else f"# {form}"
            text, found = re.subn(rf"^(# )?{form}$", line, text, flags=re.MULTILINE)
            assert found == 1, f"{form} is not in hostfile.example"
    return text, shlex.split(command)
