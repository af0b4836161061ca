"""What the run does to a contribution before the server may read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pfedmoe_mpi.core.seeds import address
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.loop import Loop
from pfedmoe_mpi.federation.masked_round import MaskedRound
from pfedmoe_mpi.federation.round_sum import RoundSum
from pfedmoe_mpi.privacy.client_release import ClientRelease

PURPOSE = "attack/protection"


def summary(federation: Federation) -> str:
    """Return the protection in words."""
    privacy, private = federation.config.privacy, federation.private
    parts = ["masked"] if privacy.masked else []
    if private:
        noise = f" with noise {private.noise:g} × clip" if private.noise else ""
        parts.append(f"clip = {privacy.clip:g} per client{noise}")
    return ", ".join(parts) or "none"


def check(federation: Federation) -> None:
    """Refuse protection that a single step of a drawn batch does not show.

    Raises:
        ConfigError: noise for single samples, whose size belongs to the run's own batches.
    """
    privacy = federation.config.privacy
    if privacy.clip and privacy.unit == "sample":
        raise ConfigError(
            "privacy.unit = sample: its noise belongs to the batches of the run, not to a step of --samples",
            "--privacy.unit client --privacy.sampling fixed --privacy.clip 0 --privacy.noise 0 "
            "--privacy.epsilon 0 attacks a step without it",
        )


def protected(loop: Loop, position: int, values: Mapping[str, Tensor], trial: int) -> RoundSum:
    """Return the next round's sum as the server decodes it, if one member's contribution is all it has.

    The contribution is made by the classes of a run. With differential privacy its update is clipped, and the
    whole noise of the sum is on it: what is left for someone who knows all other contributions. Masks are not
    opened, so the server has what was sent; the weights are known all the same.

    Args:
        position: of the member in the cohort.
        trial: chooses the noise.
    """
    federation, round = loop.federation, loop.round + 1
    method = federation.method
    payload = method.payload(federation.state_layout.sizes)
    cohort = method.cohort(round)
    release: ClientRelease | None = None
    if federation.private:
        release = federation.private.release(loop.state, round)
        seed = address(federation.config.seed, PURPOSE, trial)
        release = replace(release, expected=1.0, seed=seed)  # the update itself, not its share of a mean
    total = RoundSum(federation.task, cohort, payload, release)
    weights = {
        name: torch.ones(block.rows, dtype=torch.int64)
        if release
        else federation.task.weight(block.weight, cohort[position][0])
        for name, block in payload.items()
    }
    if federation.config.privacy.masked:
        total.masks = MaskedRound(loop.comm, federation, [client for client, _ in cohort], round)
    total.add(position, values, {"train_loss": 0.0, "accuracy_before": 0.0, "bytes_down": 0})
    if federation.config.privacy.masked:
        total.unmasked = total.blocks.copy()
        at = 0
        for name, block in payload.items():
            total.unmasked[at : at + block.rows] = np.asarray(weights[name])
            at += block.rows * (1 + block.size)
    return total
