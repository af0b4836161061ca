"""The ranks that keep and train each client: balanced by cost, and the same on every rank."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np


def homes(costs: Sequence[float], ranks: int) -> list[int]:
    """Return the rank that keeps each client: the costliest first, each to the least loaded rank."""
    least = [(0.0, rank) for rank in range(ranks)]  # a heap of (load, rank)
    home = [0] * len(costs)
    for client in np.argsort(-np.asarray(costs), kind="stable").tolist():
        load, rank = least[0]
        home[client] = rank
        heapq.heapreplace(least, (load + costs[client], rank))
    return home


def trainers(costs: Mapping[int, float], home: Sequence[int], ranks: int) -> dict[int, int]:
    """Return the rank that trains each cohort member: its home, unless that makes the round longer.

    Clients stay at home up to the bound of a balanced round (the mean load, or the costliest client); the
    rest, costliest first, go to the least loaded ranks.

    Args:
        costs: cost by cohort member.
        home: the rank that keeps each client.
    """
    bound = max(sum(costs.values()) / ranks, max(costs.values(), default=0.0))
    load = [0.0] * ranks
    place: dict[int, int] = {}
    waiting = []
    for client in sorted(costs, key=lambda client: (-costs[client], client)):
        rank = home[client]
        if load[rank] + costs[client] <= bound * (1 + 1e-9):
            place[client] = rank
            load[rank] += costs[client]
        else:
            waiting.append(client)
    for client in waiting:
        rank = min(range(ranks), key=lambda rank: (load[rank], rank != home[client], rank))
        place[client] = rank
        load[rank] += costs[client]
    return place
