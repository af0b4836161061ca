"""Client failures as an experiment: lost, slow and late clients, drawn by address, so that they repeat.

These clients train like the others and keep what they trained; only their contribution is missing from the
sum, as with HtFLlib's drop and slow rates. Time is simulated: a client's step takes its cost (training
samples times multiply-adds) divided by the mean client's, and `slowdown` times as long for a slow client.
Real time does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from pfedmoe_mpi.config.sections import FaultSettings
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.federation.round_sum import IN, LATE, LOST


class Faults:
    """The failures of each client in each round; a pure function of seed, settings and costs."""

    def __init__(self, seed: int, settings: FaultSettings, costs: Sequence[float]) -> None:
        self._seed = seed
        self._settings = settings
        slow = self._stragglers(len(costs))
        mean = sum(costs) / len(costs)
        self.durations = [
            cost / mean * (settings.slowdown if client in slow else 1.0) for client, cost in enumerate(costs)
        ]

    def _stragglers(self, clients: int) -> set[int]:
        """Draw the slow clients, once: floor(straggler · N + ½) of N."""
        number = int(self._settings.straggler * clients + 0.5)
        draw = seeds.numpy_generator(self._seed, "straggler")
        return set(draw.choice(clients, number, replace=False).tolist())

    def fate(self, round: int, client: int) -> int:
        """Return IN, LOST or LATE for a client that trains in this round."""
        draw = seeds.numpy_generator(self._seed, "dropout", round, client)
        if draw.random() < self._settings.dropout:
            return LOST
        deadline = self._settings.deadline
        return LATE if deadline and self.durations[client] > deadline else IN

    def waited(self, clients: Iterable[int]) -> float:
        """Return the simulated time that the server waits: the slowest member's, at most the deadline."""
        slowest = max((self.durations[client] for client in clients), default=0.0)
        return float(np.minimum(slowest, self._settings.deadline or np.inf))
