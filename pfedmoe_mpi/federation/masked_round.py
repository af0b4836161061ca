"""Masked sums in a round: the messages between its members and the server, sent between the ranks.

A member's part is played by the rank that keeps it, and its masks are added by the rank that trains it. What
is sent to the server reaches all ranks, because all of them play the server. `privacy/masked_sum.py` has the
protocol. The masked sum stays as it is, in memory and in checkpoints: a stop after the round's sum writes
the same numbers as one before it, and the masks are taken off a copy.

If too few members are in the sum to open it, the round counts as empty: the server's vector stays as it was,
as in a deployment, where the round would be lost. Members that a stop left untrained are not dropouts: the
restart trains them, and the sum is opened once, when all members have a fate.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.round_sum import IN, RoundSum
from pfedmoe_mpi.log import LOGGER
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.privacy import agreement, graph
from pfedmoe_mpi.privacy.masked_sum import Member, Server


def check(comm: Comm, settings: Config, method: Algorithm, layout: Layout, loaded: Checkpoint | None) -> None:
    """Check that a method's sums can be masked; collective.

    Args:
        layout: of the server's vector.
        loaded: of a run that goes on; earlier versions masked methods that send nothing, without an effect.

    Raises:
        ConfigError: on all ranks: clients send nothing, the server needs single contributions, ε takes
            cohorts for secret, a cohort has one member, the graph is impossible, or the package cryptography
            is missing.
    """
    if not settings.privacy.masked:
        return
    comm.attempt(agreement.check_installed, "packages")
    problem, remedy = "", "remove --privacy.masked, or choose another --algorithm"
    payload = method.payload(layout.sizes)
    slots = [name for name, block in payload.items() if block.slot]
    first = sorted({1, min(settings.join.round, settings.rounds)})
    sizes = {round: len(method.cohort(round)) for round in first}
    by_chance = settings.privacy.sampling == "poisson"  # such a round then counts as empty
    lonely = [round for round, size in sizes.items() if size == 1 and not by_chance]
    if not payload and not loaded:
        problem = f"clients of {settings.method} send nothing to the server"
        remedy = "--privacy.masked false, or choose another --algorithm"
    elif slots:
        problem = f"the server of {settings.method} needs each member's own '{slots[0]}', and masks hide it"
    elif method.prepared_size:
        problem = f"{settings.method} sends a vector of every single client before round 1"
    elif settings.privacy.draws_clients and settings.privacy.clips_clients:
        problem = (
            "privacy.sampling = poisson, and whether a masked sum opens depends on who is in the cohort: "
            "ε does not cover that"
        )
        remedy = "remove --privacy.sampling or --privacy.masked"
    elif lonely:
        problem = f"the cohort of round {lonely[0]} has one member, and the sum is its contribution"
        remedy = "raise --participation so that at least two clients train, or remove --privacy.masked"
    elif settings.privacy.neighbours % 2:
        even = settings.privacy.neighbours + 1
        problem = f"privacy.neighbours = {even - 1} is odd, and half of them sit on each side"
        remedy = f"--privacy.neighbours {even}"
    if problem:
        raise ConfigError(f"privacy.masked = true, but {problem}", remedy)


def exchange_keys(comm: Comm, federation: Federation, total: RoundSum, round: int) -> None:
    """Let a round's members exchange keys and shares if sums are masked; collective.

    An empty cohort has nothing to mask, and neither has a method without a payload.
    """
    if federation.config.privacy.masked and len(total.blocks) and total.cohort:
        total.masks = MaskedRound(comm, federation, [client for client, _ in total.cohort], round)


def opened(comm: Comm, total: RoundSum) -> bool:
    """Open a round's sum if it is masked; collective. Return whether there is a sum."""
    if isinstance(total.masks, MaskedRound):
        total.masks.open(comm, total)
        return total.unmasked is not None
    return not total.empty


class MaskedRound:
    """The masks of one round; `costs` are for its row.

    `bytes`: what a member sends (`up`) and receives (`down`) for the protocol, the mean over the cohort, and
    what it sends as its masked contribution (`payload`). `seconds`: what a member takes, the mean over the
    cohort, and what the server takes to open the sum, on the slowest rank. `opened`: whether it could be.
    """

    def __init__(self, comm: Comm, federation: Federation, cohort: Sequence[int], round: int) -> None:
        seed, neighbours = federation.config.seed, federation.config.privacy.neighbours
        self.costs: dict[str, Any] = {}
        self._graph = graph.draw(cohort, neighbours, seeds.numpy_generator(seed, "masked sum: graph", round))
        self._round = round
        self._member = partial(Member, seed, round, graph=self._graph)
        self._seconds = 0.0  # of this rank's members
        started = time.perf_counter()
        self._own = {k: self._member(k) for k in cohort if federation.home[k] == comm.rank}
        keys = {k: member.public for k, member in self._own.items()}
        self._seconds += time.perf_counter() - started
        self._publics = _joined(comm.gather(keys, "keys of masks"))
        started = time.perf_counter()
        sealed = {k: member.shares(self._publics) for k, member in self._own.items()}
        self._seconds += time.perf_counter() - started
        self._sealed = _joined(comm.gather(sealed, "shares of keys"))

    def add(self, client: int, contribution: np.ndarray) -> None:
        """Add a member's masks to its contribution, uint64 (numbers,), in place."""
        started = time.perf_counter()
        member = self._own.get(client) or self._member(client)
        member.mask(contribution, self._publics)
        self._seconds += time.perf_counter() - started

    def open(self, comm: Comm, total: RoundSum) -> None:
        """Take the masks off a copy of the sum, if its members can open it; collective."""
        survivors = frozenset(total.clients(IN))
        can_open = graph.can_open(self._graph, survivors)
        started = time.perf_counter()
        shares = {
            k: member.reveal(survivors, self._sealed, self._publics)
            for k, member in self._own.items()
            if k in survivors and can_open
        }
        self._seconds += time.perf_counter() - started
        every = comm.gather((shares, self._seconds), "shares of survivors")
        revealed = _joined([shares for shares, _ in every])
        started = time.perf_counter()
        if can_open:
            server = Server(self._graph, self._round, self._publics, survivors, revealed)
            # A missing member costs the server more than one in the sum, so these are divided first.
            members = sorted(self._graph, key=lambda k: k in survivors)[comm.rank :: comm.size]
            off = np.zeros(len(total.blocks), np.uint64)
            server.take_off(off, members)
            spent = time.perf_counter() - started
            comm.sum(off, "masks to take off")
            total.unmasked = (total.blocks.view(np.uint64) + off).view(np.int64)
        else:
            spent = 0.0
            LOGGER.warning("round %d: too few members are left to open its masked sum", self._round)
        slowest = max(comm.gather(spent, "seconds of the server"))
        self.costs = self._costs(revealed, total, sum(seconds for _, seconds in every), slowest)

    def _costs(
        self, revealed: Mapping[int, bytes], total: RoundSum, members: float, server: float
    ) -> dict[str, Any]:
        """Return `costs` from the messages of the round and the seconds of all members and of the server."""
        number = len(self._graph)
        own = sum(map(len, self._publics.values())) + sum(map(len, self._sealed.values()))
        keys = sum(len(self._publics[k]) for near in self._graph.values() for k in near)
        shares = sum(map(len, self._sealed.values()))  # each is received once
        flags = sum(len(near) for near in self._graph.values())  # a byte about each neighbour
        return {
            "bytes": {
                "up": (own + sum(map(len, revealed.values()))) / number,
                "down": (keys + shares + flags) / number,
                "payload": total.blocks.nbytes,
            },
            "seconds": {"member": members / number, "server": server},
            "opened": total.unmasked is not None,
        }


def _joined(parts: Sequence[Mapping[int, bytes]]) -> dict[int, bytes]:
    return {client: message for part in parts for client, message in part.items()}
