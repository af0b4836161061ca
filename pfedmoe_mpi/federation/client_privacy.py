"""Differential privacy of whole clients (`privacy.unit` = client): refusals, noise, and ε of all rounds.

With privacy.sampling = poisson, neighbouring federations differ in one client, which is there or not. A round
is a Gaussian mechanism on a Poisson sample of probability C = `participation`, and each round counts.

With fixed, a client taken away would let another one into the cohort, and the theorem on Poisson samples does
not hold: no amplification is claimed. Cohorts count as known, and neighbours differ in what one client
contributes, its updates or zeros, in the rounds in which it is drawn. ε is that of who is drawn most often.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from pfedmoe_mpi.algorithms.base import Algorithm, Block
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core.fixedpoint import SCALE
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.privacy import accountant, discrete_gaussian
from pfedmoe_mpi.privacy.client_release import ClientRelease, length

OTHER = "use another --algorithm, such as pfedmoe, fedavg or fedrep, or remove --privacy.clip"


@dataclass
class ClientPrivacy:
    """The clipping and the noise of a run; `noise` is the effective one, z."""

    settings: Config
    method: Algorithm
    layout: Layout  # of the server's vector
    noise: float
    _most: list[int] = field(default_factory=lambda: [0])  # draws of the most drawn client, by round

    def __post_init__(self) -> None:
        self._drawn = np.zeros(self.method.task.clients, np.int64)

    def release(self, state: torch.Tensor, round: int) -> ClientRelease:
        """Return how a round releases its means; `state` is the server's vector before it."""
        sizes = self.layout.sizes
        payload = {name: replace(b, weight="one") for name, b in self.method.payload(sizes).items()}
        return ClientRelease(
            self.settings.privacy.clip,
            self.noise,
            self.expected(round),
            self.settings.seed,
            round,
            payload,
            {name: state[self.layout.parts[name]] for name in payload},
        )

    def expected(self, round: int) -> float:
        """Return m, the number of members that a round expects; 1 while nobody has joined."""
        if not self.settings.privacy.draws_clients:
            return float(max(1, len(self.method.cohort(round))))
        task = self.method.task
        joined = len(task.training) - len(task.absent_clients(round) - task.unseen)
        return self.settings.participation * joined or 1.0

    def uses(self, rounds: int) -> tuple[float, int]:
        """Return the probability of a client in a round, and how many of the rounds count for it."""
        if self.settings.privacy.draws_clients:
            return self.settings.participation, rounds
        for round in range(len(self._most), rounds + 1):
            self._drawn[[client for client, _ in self.method.cohort(round)]] += 1
            self._most.append(int(self._drawn.max()))
        return 1.0, self._most[rounds]

    def entry(self, round: int) -> dict[str, Any]:
        """Return what a row says of privacy after a round; ε is null where it is infinite."""
        delta = self.settings.privacy.delta
        epsilon = accountant.epsilon(self.noise, *self.uses(round), delta)
        return {
            "unit": "client",
            "noise": self.noise,
            "delta": delta,
            "epsilon": epsilon if math.isfinite(epsilon) else None,
            "epsilon_private": None,
        }


def of(
    comm: Comm, settings: Config, method: Algorithm, layout: Layout, loaded: Checkpoint | None
) -> ClientPrivacy | None:
    """Return the clipping and noise of a run, None without; collective.

    `privacy.epsilon` is solved for the noise of the planned rounds; a run that goes on keeps its noise.

    Args:
        layout: of the server's vector.

    Raises:
        ConfigError: on all ranks: the method cannot be protected so, or dp-accounting is not installed.
    """
    privacy = settings.privacy
    if privacy.draws_clients and type(method).cohort is not Algorithm.cohort:
        problem = f"privacy.sampling = poisson, but {settings.method} draws cohorts of its own"
        raise ConfigError(problem, "remove --privacy.sampling, or choose another --algorithm")
    if not privacy.clips_clients:
        return None
    _check_method(settings, method, layout)
    found = ClientPrivacy(settings, method, layout, privacy.noise)
    known = noise_of(loaded.history) if loaded else None
    found.noise = comm.from_root(lambda: _noise(found, known), "accountant")
    _check_range(found)
    return found


def noise_of(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the noise of the rounds so far; None before round 1 and without differential privacy."""
    return history[-1].get("privacy", {}).get("noise") if history else None


def _noise(found: ClientPrivacy, known: float | None) -> float:
    """Return privacy.noise, or what privacy.epsilon needs: the noise of the rounds so far if it is known.

    Raises:
        ConfigError: dp-accounting is missing.
    """
    privacy = found.settings.privacy
    if privacy.noise or privacy.epsilon:
        accountant.check()
    if not privacy.epsilon:
        return privacy.noise
    if known is not None:
        return known
    return accountant.solve(privacy.epsilon, privacy.delta, [(1.0, *found.uses(found.settings.rounds))])


def _check_range(found: ClientPrivacy) -> None:
    """Check that noise is far above the integers' unit, where it is as good as a continuous Gaussian, and
    that all sums fit.

    A discrete Gaussian is within 1 / 40σ² of the rounded continuous one in total variation, for which the
    accountant's numbers hold. Over all numbers and rounds that has to be below a thousandth of δ.

    Raises:
        ConfigError: clip or noise is too small or too large.
    """
    settings, privacy = found.settings, found.settings.privacy
    expected = [found.expected(round) for round in (1, settings.rounds)]
    longest, shortest = (length(privacy.clip, m) for m in (min(expected), max(expected)))
    sigma = found.noise * longest
    if settings.clients * longest >= 2.0**61 or sigma > discrete_gaussian.LARGEST:
        raise ConfigError(
            f"privacy.clip = {privacy.clip:g} with noise {found.noise:g} is beyond the range of the sum",
            f"use a lower --privacy.clip; the sum holds values below {2.0 ** (62 - SCALE):.0f}",
        )
    numbers = sum(b.rows * b.size for b in found.method.payload(found.layout.sizes).values())
    sigma = found.noise * shortest
    if found.noise and numbers * settings.rounds / (40 * sigma * sigma) > privacy.delta / 1000:
        raise ConfigError(
            f"privacy.clip = {privacy.clip:g} with noise {found.noise:g} is too close to the sum's unit of "
            f"2^−{SCALE} for privacy.delta = {privacy.delta:g}",
            "raise --privacy.clip or --privacy.noise",
        )


def _check_method(settings: Config, method: Algorithm, layout: Layout) -> None:
    """Refuse a method whose contributions are not updates of the server's state of bounded influence.

    Raises:
        ConfigError: with the reason.
    """
    name = settings.method
    payload = method.payload(layout.sizes)
    if settings.unseen.private == "average":
        problem = "privacy.clip limits updates, but clients do not start from the means of private parts"
        raise ConfigError(f"{problem} (unseen.private = average)", "remove --unseen.private")
    reasons = (
        "" if payload else "clients send nothing",
        "clients send values before round 1, without noise" if method.prepared_size else "",
        "members send different parts, by their roles" if type(method).cohort is not Algorithm.cohort else "",
        *(_reason(block, layout.sizes.get(part)) for part, block in payload.items()),
    )
    if reason := next(filter(None, reasons), ""):
        raise ConfigError(f"privacy.unit = client does not protect {name}: {reason}", OTHER)
    for part in payload:
        # A module's buffers are the entries that are not trained; a plain tensor has no name of its own.
        buffers = [e for e in layout.entries if e.name.startswith(f"{part}/") and not e.trained]
        if any(e.name != f"{part}/" for e in buffers):
            raise ConfigError(
                f"privacy.unit = client: {part} has BatchNorm, whose running statistics clients send; a "
                "variance may become negative by noise",
                "use --gate.input_norm layer --gate.batch_norm false"
                if part.endswith("gate")
                else "use architectures without it, such as --model.shared cnn5 and --model.pool cnn5, or "
                "--model.train head",
            )


def _reason(block: Block, size: int | None) -> str:
    """Return the reason why a block is not protected; empty if it is. `size`: of the state's part."""
    if block.slot:
        return "its server needs single contributions"
    if block.weight.startswith("class"):
        return "the weights of its mean count clients' labels"
    if size != block.rows * block.size:
        return "clients do not send updates of the server's parts"
    return ""
