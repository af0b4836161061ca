"""What the run does to a contribution before the server may read it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pfedmoe_mpi.config.privacy_settings import PrivacySettings
from pfedmoe_mpi.core.seeds import numpy_generator
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation.loop import Loop
from pfedmoe_mpi.federation.round_sum import RoundSum

PURPOSE = "attack/protection"


def summary(privacy: PrivacySettings) -> str:
    """Return the protection in words."""
    parts = ["masked"] if privacy.masked else []
    if privacy.clip:
        noise = f" with noise {privacy.noise:g} × clip" if privacy.noise else ""
        parts.append(f"clip = {privacy.clip:g} per {privacy.unit}{noise}")
    return ", ".join(parts) or "none"


def check(privacy: PrivacySettings) -> None:
    """Raise ConfigError for protection that a single contribution does not show.

    Raises:
        ConfigError: noise without a clip, noise that would be solved for, or noise for single samples.
    """
    if privacy.epsilon:
        raise ConfigError(
            "privacy.epsilon chooses a noise for a whole run, and one step is attacked",
            "--privacy.epsilon 0 --privacy.noise Z, with the noise of the run",
        )
    if privacy.noise and not privacy.clip:
        problem = f"privacy.noise = {privacy.noise:g} is a multiple of privacy.clip, which is 0"
        raise ConfigError(problem, "--privacy.clip C, the largest norm of an update")
    if privacy.clip and privacy.unit == "sample":
        raise ConfigError(
            "privacy.unit = sample protects gradients within a step, and is not simulated here",
            "--privacy.unit client, or --privacy.clip 0 --privacy.noise 0",
        )


def protected(loop: Loop, client: int, role: str, values: Mapping[str, Tensor], trial: int) -> RoundSum:
    """Return the round's sum as the server decodes it, if this member's contribution is all it has.

    The integers are those of the member in a cohort of its own. With differential privacy the update is
    clipped to `privacy.clip`, and noise of `privacy.noise` · `privacy.clip` is added: what is left of a sum
    for someone who knows all other contributions. A masked contribution is uniform on the ring modulo 2^64;
    its weight is known all the same.
    """
    federation = loop.federation
    privacy, method = federation.config.privacy, federation.method
    payload = method.payload(federation.state_layout.sizes)
    total = RoundSum(federation.task, [(client, role)], payload)
    places = federation.state_layout.parts
    if privacy.clip:
        draw = torch.Generator().manual_seed(int(_draw(loop, client, trial).integers(1 << 62)))
        values = _private(values, {n: loop.state[p] for n, p in places.items()}, privacy, draw)
    total.add(0, values, {"train_loss": 0.0, "accuracy_before": 0.0, "bytes_down": 0})
    if privacy.masked:
        draw_masks = _draw(loop, client, trial)
        at = len(total.buffer) - sum(block.rows * (1 + block.size) for block in payload.values())
        for block in payload.values():
            at += block.rows  # the weights: the server knows every client's n_k
            numbers = total.buffer[at : at + block.rows * block.size]
            numbers += draw_masks.integers(-(1 << 63), (1 << 63) - 1, len(numbers), np.int64, endpoint=True)
            at += len(numbers)
    return total


def _private(
    values: Mapping[str, Tensor], state: Mapping[str, Tensor], privacy: PrivacySettings, draw: torch.Generator
) -> dict[str, Tensor]:
    """Return the values with the update clipped by its joint norm, and noise."""
    start = {name: state[name] if name in state else torch.zeros_like(v) for name, v in values.items()}
    updates = {
        name: value.cpu().double().reshape(-1) - start[name].double().reshape(-1)
        for name, value in values.items()
    }
    norm = float(torch.sqrt(sum(((each**2).sum() for each in updates.values()), torch.zeros(()))))
    factor, std = min(1.0, privacy.clip / norm) if norm else 1.0, privacy.noise * privacy.clip
    return {
        name: (start[name].double().reshape(-1) + factor * each + std * _normal(each, draw)).float()
        for name, each in updates.items()
    }


def _normal(like: Tensor, draw: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=draw, dtype=like.dtype)


def _draw(loop: Loop, client: int, trial: int) -> np.random.Generator:
    return numpy_generator(loop.federation.config.seed, PURPOSE, trial, client)
