"""`bench privacy`: what masked sums cost a member and the server, for cohorts of 10 to 1,000 members.

One process plays one member with all its neighbours' messages, and the server for a few members. The bytes
are those of one member's messages; its seconds are measured. The server's seconds are measured for SAMPLE
members and extrapolated to the cohort, with nobody missing and with a tenth missing. It needs no launcher.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pfedmoe_mpi import environment
from pfedmoe_mpi.bench.progress import announce
from pfedmoe_mpi.errors import EXIT_DONE, ConfigError
from pfedmoe_mpi.mpi import device
from pfedmoe_mpi.privacy import agreement, graph
from pfedmoe_mpi.privacy.masked_sum import SEALED, Member, Server
from pfedmoe_mpi.privacy.secret_sharing import SHARE

MEMBERS = (10, 30, 100, 300, 1000)
SPARSE = 30  # neighbours
NUMBERS = 100_000  # of a contribution
SAMPLE = 5  # members that the server opens
HEADING = (
    f"{'members':>7}{'neighbours':>12}{'sent, kB':>10}{'received, kB':>14}{'payload, kB':>13}"
    f"{'member, s':>11}{'server, s':>11}{'a tenth missing, s':>20}"
)


@dataclass(frozen=True)
class Costs:
    """Bytes and seconds of a round; `server`: with nobody missing, and with a tenth of the members."""

    neighbours: int
    sent: int
    received: int
    member: float
    server: tuple[float, float]


def run(words: Sequence[str]) -> int:
    """Print the table, for complete graphs and sparse ones.

    Args:
        words: how many numbers a contribution has, or nothing.

    Raises:
        ConfigError: there are other words, or the package cryptography is missing.
    """
    if len(words) > 1 or not all(word.isdecimal() and int(word) for word in words):
        problem = f"bench privacy takes the numbers of a contribution, not {' '.join(words)}"
        raise ConfigError(problem, f"pfedmoe-mpi bench privacy {NUMBERS}")
    agreement.check_installed("bench privacy")
    numbers = int(words[0]) if words else NUMBERS
    print(f"{device.processor()}: {environment.CORES} cores, {time.strftime('%Y-%m-%d %H:%M %z')}")
    print(HEADING, flush=True)
    for members in MEMBERS:
        for neighbours in dict.fromkeys((0, SPARSE if members > SPARSE + 1 else 0)):
            announce(f"privacy: {members} members")
            found = measure(members, neighbours, numbers)
            payload = 8 * numbers / 1e3
            print(
                f"{members:7d}{found.neighbours:12d}{found.sent / 1e3:10.1f}{found.received / 1e3:14.1f}"
                f"{payload:13.1f}{found.member:11.3f}{found.server[0]:11.3f}{found.server[1]:20.3f}",
                flush=True,
            )
    return EXIT_DONE


def measure(size: int, neighbours: int, numbers: int) -> Costs:
    """Return what a round of `size` members costs with contributions of `numbers` numbers."""
    drawn = graph.draw(range(size), neighbours, np.random.default_rng(0))
    members = {client: Member(0, 1, client, drawn) for client in drawn}
    publics = {client: member.public for client, member in members.items()}
    sealed = {other: _sealed_for_first(drawn, members[0], other, publics) for other in drawn[0]}
    # A member of its own, because the first one keeps its keys and shares.
    own, contribution = Member(0, 1, 0, drawn), np.zeros(numbers, np.uint64)
    started = time.perf_counter()
    sent = [own.public, own.shares(publics)]
    own.mask(contribution, publics)
    sent.append(own.reveal(drawn.keys(), sealed, publics))
    seconds = time.perf_counter() - started
    near = len(drawn[0])
    # Keys of the neighbours, their shares, and a byte about each.
    received = near * (len(sent[0]) + len(sent[1]) // near + 1)
    missing = frozenset(range(0, size, 10))
    none, tenth = (_server(drawn, members, publics, gone, numbers) for gone in (frozenset[int](), missing))
    return Costs(near, sum(map(len, sent)), received, seconds, (none, tenth))


def _sealed_for_first(drawn: graph.Graph, first: Member, other: int, publics: dict[int, bytes]) -> bytes:
    """Return a neighbour's message 2 with zeros for shares, and nothing but its part for member 0."""
    sealed = agreement.seal(first.seal_key(other, publics), other, bytes(2 * SHARE))
    return bytes(drawn[other].index(0) * SEALED) + sealed


def _server(
    drawn: graph.Graph,
    members: dict[int, Member],
    publics: dict[int, bytes],
    missing: frozenset[int],
    numbers: int,
) -> float:
    """Return the seconds of a server that opens a sum, from SAMPLE members in it and as many missing ones."""
    survivors = drawn.keys() - missing
    total, seconds = np.zeros(numbers, np.uint64), 0.0
    for alike in (survivors, missing):
        # In a complete graph all members have the same weights of shares: the first one pays for them.
        for untimed, member in zip((True, *[False] * SAMPLE), sorted(alike), strict=False):
            part = slice(0, SHARE) if member in survivors else slice(SHARE, 2 * SHARE)
            revealed = {}
            for holder, shares in members[member].secret_shares.items():
                place = graph.holders(drawn, holder).index(member)
                revealed[holder] = bytes(place * SHARE) + shares[part]
            server = Server(drawn, 1, publics, survivors, revealed)
            started = time.perf_counter()
            server.take_off(total, [member])
            if not untimed or len(alike) == 1:
                spent = time.perf_counter() - started
                seconds += spent * len(alike) / max(1, min(SAMPLE, len(alike) - 1))
    return seconds
