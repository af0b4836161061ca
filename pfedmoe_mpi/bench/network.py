"""`bench network`: the bytes that a round sends between hosts, their lower bound, and the time they take.

    mpirun -f hostfile -n 2 python -m pfedmoe_mpi bench network

The table distinguishes a deployment from this program. A deployment sends the server's state to every client
of the cohort and what the client trained back, as float32. This program first adds the clients of a rank and
sends one int64 sum between hosts; with H hosts an all-reduce of n bytes sends at least 2 n (H - 1) / H from
each (Patarasuk and Yuan, JPDC 2009), which is n for two.

The bytes sent are read from the kernel's counters: on each host, those of the busiest interface except the
loopback. Interfaces are not added, because a bond counts the bytes of its parts again. A fabric that bypasses
the kernel (InfiniBand verbs) is not counted.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from pfedmoe_mpi.bench import timing
from pfedmoe_mpi.bench.timing import Line
from pfedmoe_mpi.federation import placement
from pfedmoe_mpi.federation.loop import Loop
from pfedmoe_mpi.federation.metrics import Row
from pfedmoe_mpi.mpi.comm import Comm

COUNTERS = Path("/proc/net/dev")  # of this process's network namespace, which /sys/class/net ignores

SPLIT = ("train", "evaluate", "sum", "wait")

Counters = Mapping[str, int]  # bytes sent, by interface


@dataclass(frozen=True)
class Sent:
    """The bytes that one host sent per round."""

    host: str
    interface: str
    bytes: float


def measure(world: Comm, loop: Loop, rounds: int = timing.REPEATS) -> list[Line]:
    """Run one round to warm up, then measure `rounds` rounds; collective."""
    timing.run_round(loop)
    before = _read_counters(world)
    for _ in range(rounds):
        timing.run_round(loop)
    sent = per_round(before, _read_counters(world), rounds)
    rows, numbers = loop.history[-rounds:], loop.federation.state_layout.size
    client = median((row["bytes"]["up"] or 0) + row["bytes"]["down"] for row in rows)
    members, summed = len(rows[-1]["cohort"]), rows[-1]["mpi_bytes"]
    return [
        _bytes("deployment: one client's bytes, up and down", client, 2 * 4 * numbers),
        _bytes(f"deployment: those of a cohort of {members}", client * members),
        _bytes("MPI: summed, int64, with flags and metrics", summed, 8 * numbers),
        *crossed(sent, summed),
        *_times(rows, sent, client),
        *_away(loop, world.size),
    ]


def _times(rows: Sequence[Row], sent: Sequence[Sent], client: float) -> list[Line]:
    """Return the median times of the rounds, and the link's rate from the time of the sum.

    Args:
        client: bytes of one client of a deployment, whose time at that rate is a line too.
    """
    seconds = {name: median(row["seconds"][name] for row in rows) for name in ("total", *SPLIT)}
    lines = [Line("round on this link", f"{seconds['total']:.4g} s")]
    lines += [Line(f"  {name}, slowest rank", f"{seconds[name]:.4g} s") for name in SPLIT]
    most = max(host.bytes for host in sent)
    if len(sent) > 1 and most and seconds["sum"]:
        rate = most / seconds["sum"]
        lines += [
            Line("rate of the sum: bytes one host sent, by its time", f"{8 * rate / 1e6:.4g} Mbit/s"),
            Line("deployment: one client's bytes at that rate", f"{client / rate:.4g} s"),
        ]
    return lines


def crossed(sent: Sequence[Sent], summed: int) -> list[Line]:
    """Return a line per host: its bytes, and the least that an all-reduce of `summed` bytes needs."""
    hosts = len(sent)
    if hosts == 1:
        return [Line("MPI: one host, so nothing crosses a link", "0 MB")]
    least = 2 * summed * (hosts - 1) / hosts
    return [_bytes(f"MPI: sent by {host.host} over {host.interface}", host.bytes, least) for host in sent]


def per_round(before: Mapping[str, Counters], after: Mapping[str, Counters], rounds: int) -> list[Sent]:
    """Return each host's busiest interface and its bytes per round."""
    sent = []
    for host, counters in after.items():
        increase = {name: count - before[host].get(name, 0) for name, count in counters.items()}
        busiest = max(increase, key=lambda name: increase[name], default="no interface")
        sent.append(Sent(host, busiest, increase.get(busiest, 0) / rounds))
    return sent


def bytes_sent(table: str) -> dict[str, int]:
    """Return the bytes sent by interface, except the loopback, from the text of /proc/net/dev."""
    counters = {}
    for line in table.splitlines()[2:]:
        name, _, numbers = line.partition(":")
        if name.strip() != "lo":
            counters[name.strip()] = int(numbers.split()[8])
    return counters


def _read_counters(world: Comm) -> dict[str, Counters]:
    """Return every host's counters, as read by its first rank."""
    try:
        counters = bytes_sent(COUNTERS.read_text(encoding="utf-8", errors="replace"))
    except OSError:  # not Linux
        counters = {}
    return dict(reversed(world.gather((platform.node(), counters), "bench")))


def _away(loop: Loop, ranks: int) -> list[Line]:
    """Count the clients that trained away from their home rank in the last round.

    Their vectors and data are sent too.
    """
    federation = loop.federation
    costs = {client: federation.costs[client] for client, _ in federation.method.cohort(loop.round)}
    trainer = placement.trainers(costs, federation.home, ranks)
    away = sum(federation.home[client] != rank for client, rank in trainer.items())
    return [Line("clients trained away from home, in the bytes above", str(away))] if away else []


def _bytes(what: str, ours: float, reference: float = 0) -> Line:
    """Return a line in megabytes, with the ratio to a reference if there is one."""
    shown = f"{ours / 1e6:.4g} MB"
    return (
        Line(what, shown, f"{reference / 1e6:.4g} MB", ours / reference) if reference else Line(what, shown)
    )
