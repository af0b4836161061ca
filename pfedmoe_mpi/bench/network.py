"""`bench network`: what a round sends from host to host, against what it must, and how long that takes.

    mpirun -f hostfile -n 2 python -m pfedmoe_mpi bench network

Two things are told apart. A deployment sends the server's state down to every client of the cohort and what
the client trained up again, as float32. This program adds up the clients of a rank first and sends one int64
sum from host to host; between H hosts an all-reduce of n bytes sends at least 2 n (H - 1) / H from each
(Patarasuk and Yuan, JPDC 2009), which is n for two.

What was sent is read from the kernel's counters: on each host those of the busiest interface that is not the
loopback, because a bond counts the bytes of its parts again. A fabric that goes around the kernel (InfiniBand
verbs) does not show there.
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

COUNTERS = Path("/proc/net/dev")  # of this process's own network namespace, unlike /sys/class/net

SPLIT = ("train", "evaluate", "sum", "wait")

Counters = Mapping[str, int]  # bytes sent, by interface


@dataclass(frozen=True)
class Sent:
    """What one host sent in a round."""

    host: str
    interface: str
    bytes: float


def measure(world: Comm, loop: Loop, rounds: int = timing.REPEATS) -> list[Line]:
    """Play one round to warm up and `rounds` that count; collective."""
    timing.play(loop)
    before = _counted(world)
    for _ in range(rounds):
        timing.play(loop)
    sent = per_round(before, _counted(world), rounds)
    rows, numbers = loop.history[-rounds:], loop.federation.state_layout.size
    client = median((row["bytes"]["up"] or 0) + row["bytes"]["down"] for row in rows)
    members, summed = len(rows[-1]["cohort"]), rows[-1]["mpi_bytes"]
    return [
        _bytes("deployment: one client's bytes, up and down", client, 2 * 4 * numbers),
        _bytes(f"deployment: those of a cohort of {members}", client * members),
        _bytes("MPI: summed, int64, with flags and metrics", summed, 8 * numbers),
        *crossed(sent, summed),
        *_spent(rows, sent, client),
        *_moved(loop, world.size),
    ]


def _spent(rows: Sequence[Row], sent: Sequence[Sent], client: float) -> list[Line]:
    """The rounds' median times; the sum's tells how fast the link is, for `client` bytes of a client too."""
    spent = {name: median(row["seconds"][name] for row in rows) for name in ("total", *SPLIT)}
    lines = [Line("round on this link", f"{spent['total']:.4g} s")]
    lines += [Line(f"  {name}, slowest rank", f"{spent[name]:.4g} s") for name in SPLIT]
    most = max(host.bytes for host in sent)
    if len(sent) > 1 and most and spent["sum"]:
        rate = most / spent["sum"]
        lines += [
            Line("rate of the sum: bytes one host sent, by its time", f"{8 * rate / 1e6:.4g} Mbit/s"),
            Line("deployment: one client's bytes at that rate", f"{client / rate:.4g} s"),
        ]
    return lines


def crossed(sent: Sequence[Sent], summed: int) -> list[Line]:
    """A line per host: its bytes against the fewest an all-reduce of `summed` bytes needs."""
    hosts = len(sent)
    if hosts == 1:
        return [Line("MPI: one host, so nothing crosses a link", "0 MB")]
    least = 2 * summed * (hosts - 1) / hosts
    return [_bytes(f"MPI: sent by {host.host} over {host.interface}", host.bytes, least) for host in sent]


def per_round(before: Mapping[str, Counters], after: Mapping[str, Counters], rounds: int) -> list[Sent]:
    """Each host's busiest interface and its bytes per round."""
    found = []
    for host, counters in after.items():
        grown = {name: counted - before[host].get(name, 0) for name, counted in counters.items()}
        busiest = max(grown, key=lambda name: grown[name], default="no interface")
        found.append(Sent(host, busiest, grown.get(busiest, 0) / rounds))
    return found


def bytes_sent(table: str) -> dict[str, int]:
    """Bytes sent by interface, the loopback left out, from the text of /proc/net/dev."""
    found = {}
    for line in table.splitlines()[2:]:
        name, _, numbers = line.partition(":")
        if name.strip() != "lo":
            found[name.strip()] = int(numbers.split()[8])
    return found


def _counted(world: Comm) -> dict[str, Counters]:
    """Every host's counters, as its first rank reads them."""
    try:
        own = bytes_sent(COUNTERS.read_text())
    except OSError:  # not Linux
        own = {}
    return dict(reversed(world.gather((platform.node(), own), "bench")))


def _moved(loop: Loop, ranks: int) -> list[Line]:
    """Clients that trained on another rank in the last round: their vectors and data cross as well."""
    federation = loop.federation
    costs = {client: federation.costs[client] for client, _ in federation.method.cohort(loop.round)}
    trainer = placement.trainers(costs, federation.home, ranks)
    away = sum(federation.home[client] != rank for client, rank in trainer.items())
    return [Line("clients trained away from home, in the bytes above", str(away))] if away else []


def _bytes(what: str, ours: float, reference: float = 0) -> Line:
    """Megabytes, against a reference if there is one."""
    shown = f"{ours / 1e6:.4g} MB"
    return (
        Line(what, shown, f"{reference / 1e6:.4g} MB", ours / reference) if reference else Line(what, shown)
    )
