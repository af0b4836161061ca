"""Two hosts: the printed hostfile, the same bits, the bytes sent, and a host that vanishes during a round."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pfedmoe_mpi import checkpoint
from support import launcher, two_hosts
from support.two_hosts import TwoHosts

pytestmark = [pytest.mark.netns, pytest.mark.timeout(240)]

BOTH = pytest.mark.parametrize("mpi", ["mpich", pytest.param("openmpi", marks=pytest.mark.openmpi)])
ROUNDS = 3
FLAGS = (
    *("--data.source", "synthetic", "--data.samples", "400", "--data.size", "8", "--clients", "4"),
    *("--model.pool", "mlp5,mlp4", "--model.shared", "mlp5", "--train.device", "cpu", "--train.epochs", "30"),
    *("--rounds", str(ROUNDS), "--run.checkpoint_every", "1", "--run.dir", "run"),
)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    (tmp_path / "hosts").mkdir()
    with two_hosts.running_hosts(tmp_path / "hosts") as both:
        yield both


@pytest.fixture(scope="module")
def alone(session: launcher.Session, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the undisturbed run on one host."""
    folder = tmp_path_factory.mktemp("alone")
    result = launcher.run_program(2, *FLAGS, cwd=folder)
    assert result.code == 0, result.err
    return digest(session, folder / "run")


def digest(session: launcher.Session, run: Path) -> str:
    last = run / "checkpoints" / checkpoint.name(ROUNDS, partial=False)
    result = session("inspect", "--digest", str(last), cwd=run)
    assert re.fullmatch(r"[0-9a-f]{64}\n", result.out), result.err
    return result.out


def finished(job: subprocess.Popen[str], timeout: float = 90) -> str:
    result = launcher.wait_for_end(job, timeout)
    assert result.code == 0, result.out + result.err
    return result.out


# Across two hosts


@BOTH
def test_printed_hostfile_works_unchanged(hosts: TwoHosts, tmp_path: Path, mpi: str) -> None:
    """The hostfile starts 32 ranks; only the form of this MPI is kept. The next tests use its command."""
    hostfile, line = two_hosts.hostfile_and_command(mpi, 16)
    (tmp_path / "hostfile").write_text(hostfile)
    said = ["sh", "-c", "uname -n; sleep 1"]  # prterun may lose count of processes that end at once
    printed = finished(hosts.launch(mpi, [*line[: line.index("python")], *said], cwd=tmp_path))
    assert Counter(printed.split()) == {"node1": 16, "node2": 16}


@BOTH
def test_two_hosts_give_the_digest_of_one(
    hosts: TwoHosts, tmp_path: Path, session: launcher.Session, alone: str, mpi: str
) -> None:
    before = {name: hosts.sent(name) for name in two_hosts.NAMES}
    finished(hosts.across(mpi, 4, *FLAGS, cwd=tmp_path))
    assert digest(session, tmp_path / "run") == alone
    (start,) = [event for event in launcher.read_events(tmp_path / "run") if event["event"] == "start"]
    assert [re.findall("node.", rank) for rank in start["hosts"]] == [
        ["node1"],
        ["node1"],
        ["node2"],
        ["node2"],
    ]
    summed = sum(row["mpi_bytes"] for row in launcher.read_metrics(tmp_path / "run"))
    for name in two_hosts.NAMES:
        assert hosts.sent(name) - before[name] > summed, "the sums did not go over the link"


# A host vanishes


@BOTH
@pytest.mark.parametrize("how", ["killed", "unreachable"])
def test_vanished_host_ends_the_job_and_restart_repeats_it(
    hosts: TwoHosts, tmp_path: Path, session: launcher.Session, alone: str, mpi: str, how: str
) -> None:
    """The job ends soon, no process is left, and a restart on the other host gives the same bits.

    Open MPI's mpirun may end with code 0 here, and waits for an unreachable host as long as TCP does.
    """
    if mpi == "openmpi":
        hosts.give_up_early()
    run = tmp_path / "run"
    job = hosts.across(mpi, 2, *FLAGS, "--run.timeout", "3", cwd=tmp_path)
    launcher.wait_for_file(run / "metrics.jsonl", job)
    time.sleep(0.1)
    vanished = time.monotonic()
    hosts.kill("node2") if how == "killed" else hosts.link("node2", "down")
    result = launcher.wait_for_end(job, 60)
    print(f"{mpi}, node2 {how}: exit code {result.code} after {time.monotonic() - vanished:.1f} s")
    assert len(launcher.read_metrics(run)) < ROUNDS, "the run was over before"
    assert "finish" not in {event["event"] for event in launcher.read_events(run)}
    if mpi == "mpich":
        assert result.code not in {0, 2, 75}
    if how == "unreachable":
        said = " ".join(
            (result.out + result.err).split()
        )  # Open MPI's ranks see a terminal, which wraps lines
        assert re.search("rank 1 did not reach '.*' within 3 s", said), said
    # Cut off from mpirun, node2's ranks end by themselves, ten seconds later; the restart does not mind them.
    line = ["mpirun", "-n", "2", "python", "-m", "pfedmoe_mpi", "restart", "run", "--run.timeout", "0"]
    finished(hosts.launch(mpi, line, cwd=tmp_path))
    assert digest(session, run) == alone
    hosts.empty("node2", 30)
    hosts.empty("node1", 10)  # where the launcher may leave an ssh that waits for the other host


def test_hosts_are_removed_after_an_error(tmp_path: Path) -> None:
    """Their processes end too, whatever a test raises."""
    jobs = []

    def fail() -> None:
        with two_hosts.running_hosts(tmp_path) as hosts:
            jobs.append(subprocess.Popen([*hosts.enter("node2"), "sleep", "1000"], start_new_session=True))
            while jobs[0].pid not in hosts.processes("node2"):
                time.sleep(0.01)
            networks.extend(hosts.networks.values())
            raise ZeroDivisionError

    networks: list[str] = []
    with pytest.raises(ZeroDivisionError):
        fail()
    assert jobs[0].wait(10) < 0
    assert not [pid for network in networks for pid in two_hosts.namespace_processes(network)]


# bench network


def network(hosts: TwoHosts, folder: Path, mpi: str, *flags: str) -> dict[str, list[str]]:
    """Return the rows of `bench network` on one rank per host, by title."""
    printed = finished(hosts.across(mpi, 2, "bench", "network", *flags, cwd=folder), 400)
    rows = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    return {title: cells for title, *cells in rows if cells}


def number(cells: list[str]) -> float:
    return float(cells[0].split()[0])


def test_bench_network_counts_bytes_and_reflects_the_rate(hosts: TwoHosts, tmp_path: Path) -> None:
    """Bytes are within a tenth of the formula; headers, acknowledgements and waiting explain the rest."""
    small = ("--data.samples", "200", "--data.size", "8", "--clients", "4", "--partition.kind", "iid")
    flags = (*small, "--model.pool", "mlp5,mlp4", "--model.shared", "mlp5", "--train.device", "cpu")
    before = hosts.sent("node1")
    fast = network(hosts, tmp_path, "mpich", *flags)
    crossed = (hosts.sent("node1") - before) / 1e6
    hosts.rate(10)
    slow = network(hosts, tmp_path, "mpich", *flags)
    shared = 139_100  # numbers of the shared MLP-5's extractor
    for table in (fast, slow):
        assert number(table["deployment: one client's bytes, up and down"]) == pytest.approx(
            8e-6 * shared, 1e-3
        )
        assert number(table["deployment: those of a cohort of 4"]) == pytest.approx(32e-6 * shared, 1e-3)
        assert number(table["MPI: summed, int64, with flags and metrics"]) == pytest.approx(
            8e-6 * shared, 1e-2
        )
        for name in two_hosts.NAMES:
            sent, least, ratio = table[f"MPI: sent by {name} over eth0"]
            assert sent.endswith(" MB") and least.endswith(" MB") and 0.99 < float(ratio) < 1.1
    own = number(fast["MPI: sent by node1 over eth0"])
    assert 6 * own < crossed < 8 * own + 1, "six rounds and little else"
    seconds = 8 * 8 * shared / 10e6
    assert number(slow["sum, slowest rank"]) > 0.9 * seconds
    assert number(slow["round on this link"]) > number(fast["round on this link"]) + 0.5 * seconds
    assert 7 < number(slow["rate of the sum: bytes one host sent, by its time"]) < 11
    assert number(slow["deployment: one client's bytes at that rate"]) > 0.9 * seconds


RATES = (10, 100, 1000, None)  # Mbit/s


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@BOTH
def test_link_rate_table_is_measured(hosts: TwoHosts, tmp_path: Path, mpi: str) -> None:
    """CNN-5 shared among CNN-1 to CNN-5, ten clients on images of CIFAR's size; prints the README's table."""
    titles = ("link", "round, s", "its training, s", "its sum, s", "sent per host, MB", "by formula, MB")
    lines = [(*titles, "a deployment's client, s"), ("---",) * 7]
    rounds = []
    for rate in RATES:
        hosts.rate(rate)
        table = network(hosts, tmp_path, mpi, "--data.samples", "2000")
        sent, least, ratio = table["MPI: sent by node1 over eth0"]
        assert 0.99 < float(ratio) < 1.1  # packets carry headers
        spent = [table[title] for title in ("round on this link", "train, slowest rank")]
        own = number(table["deployment: one client's bytes, up and down"])
        rounds.append(number(table["round on this link"]))
        lines.append(
            (
                f"{rate} Mbit/s" if rate else "unlimited",
                *(f"{number(cells):.3g}" for cells in (*spent, table["sum, slowest rank"])),
                f"{number([sent]):.3g}",
                f"{number([least]):.3g}",
                f"{8 * own / rate:.3g}" if rate else "",
            )
        )
    print(f"\n{mpi}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}")
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    assert rounds[0] > rounds[1] > rounds[-1]
