"""Draws of the clients that train in a round, by address."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core import seeds


def draw(config: Config, clients: Sequence[int], number: int, round: int, purpose: str) -> list[int]:
    """Draw max(1, floor(C·n + ½)) of n clients without replacement, ascending.

    With privacy.sampling = poisson each is drawn with probability C, and there may be none.

    Args:
        number: N, of all clients.
    """
    generator = seeds.numpy_generator(config.seed, purpose, round)
    if config.privacy.draws_clients:
        drawn = generator.random(number) < config.participation
        return [client for client in sorted(clients) if drawn[client]]
    if not clients:
        return []
    size = max(1, int(config.participation * len(clients) + 0.5))
    return sorted(generator.choice(np.array(clients), size, replace=False).tolist())
