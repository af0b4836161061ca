"""The accounts of clients that train by DP-SGD (`privacy.unit` = sample).

Neighbouring data sets differ in one sample of one client, which trains or does not. The numbers n_k of
samples, cohorts and seeds count as known. Every client has two accounts:

- `epsilon` is about what it sends, which the server and other clients see. It has every update of a phase
  that trains more than parts apart (`Algorithm.apart`): what is sent may depend on a private part trained
  with it or before it, so the updates of private parts count here as well, and have to be noised.
- `epsilon_private` is about its whole model, private parts included, if that is released too. It has every
  update. An update whose parts are in two groups with norms of their own moves by up to √2·C with a sample,
  so that its noise multiplier is z / √2; with one norm it is z, for both accounts.

An update is one use of a Gaussian mechanism. With privacy.sampling = fixed a sample is in exactly one batch
of an epoch, and batches are disjoint: a use for each epoch, without amplification. With poisson it is in
each update with probability B / n_k: ⌈n_k / B⌉ uses for each epoch, amplified by sampling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core.sample_step import SamplePrivacy
from pfedmoe_mpi.privacy import accountant


@dataclass(frozen=True)
class Uses:
    """How often the mechanism is used in a client step: for what is sent, and in all."""

    sent: int
    every: int
    probability: float
    groups: int


def uses(settings: Config, method: Algorithm, privacy: SamplePrivacy, role: str, samples: int) -> Uses:
    """Return the uses in a client step with so many samples, from the method's phases."""
    train = settings.train
    sent = every = groups = 0
    expected = min(samples, train.batch * train.accumulate)
    shares = bool(method.state())
    for phase in method.phases(role):
        if privacy.poisson:
            times = phase.steps or phase.epochs * math.ceil(samples / expected)
        else:
            times = math.ceil(phase.steps / train.updates(samples)) if phase.steps else phase.epochs
        names = list(phase.lr)
        every += times
        sent += times if shares and not privacy.apart.issuperset(names) else 0
        groups = max(groups, len(privacy.groups(names)))
    return Uses(sent, every, expected / samples if privacy.poisson else 1.0, groups)


class SampleAccounts:
    """The uses of all clients so far."""

    def __init__(self, settings: Config, method: Algorithm, privacy: SamplePrivacy) -> None:
        self._settings, self._method, self._privacy = settings, method, privacy
        clients = method.task.clients
        self._sent, self._every = np.zeros(clients, np.int64), np.zeros(clients, np.int64)
        self._probability = np.zeros(clients)  # the largest, where n_k changes
        self._sensitivity = 1.0
        self._known: dict[tuple[str, int], Uses] = {}

    def add(self, cohort: Sequence[tuple[int, str]], samples: np.ndarray) -> None:
        """Count a round.

        Args:
            samples: n_k of every client in this round, (N,).
        """
        for client, role in cohort:
            key = role, int(samples[client])
            if key not in self._known:
                self._known[key] = uses(self._settings, self._method, self._privacy, *key)
            found = self._known[key]
            self._sent[client] += found.sent
            self._every[client] += found.every
            self._probability[client] = max(self._probability[client], found.probability)
            self._sensitivity = max(self._sensitivity, math.sqrt(found.groups))

    def spent(self, noise: float, delta: float) -> tuple[float, float]:
        """Return the largest `epsilon` and `epsilon_private` of a client."""
        every = noise / self._sensitivity
        return (
            max((accountant.epsilon(noise, q, n, delta) for q, n in self._distinct(self._sent)), default=0.0),
            max(
                (accountant.epsilon(every, q, n, delta) for q, n in self._distinct(self._every)), default=0.0
            ),
        )

    def noise(self, target: float, delta: float) -> float:
        """Return the least noise with which no account exceeds a target."""
        return accountant.solve(
            target, delta, ((self._sensitivity, q, n) for q, n in self._distinct(self._every))
        )

    def _distinct(self, steps: np.ndarray) -> list[tuple[float, int]]:
        """Return the pairs of probability and steps that clients have, the largest probability first."""
        pairs = {(float(q), int(n)) for q, n in zip(self._probability, steps, strict=True) if n}
        return sorted(pairs, reverse=True)
