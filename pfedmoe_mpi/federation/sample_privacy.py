"""DP-SGD in a federation (`privacy.unit` = sample): its settings, and what is refused before round 1.

What a client sends and keeps may depend on its samples by clipped and noised gradients alone. Methods that
say how else they use samples are refused, and so are models whose normalisation mixes samples. For all
others one client of every architecture and role computes a step on a few samples, whose result is dropped:
the gradient of a batch has to be the mean of its samples' gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch.nn.modules.batchnorm import _BatchNorm

from pfedmoe_mpi.algorithms.base import Algorithm, Task
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.fixedpoint import SCALE, NotFiniteError
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.sample_step import NotPerSampleError, SamplePrivacy
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation import trial
from pfedmoe_mpi.federation.client_privacy import check_noise, noise_of
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.stream import Stream
from pfedmoe_mpi.models.switchnorm import SwitchNorm
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.privacy import accountant
from pfedmoe_mpi.privacy.sample_accounts import SampleAccounts

FEW = 4  # samples of a trial
MOST_NOISE = 2.0 ** (62 - SCALE)  # z·C: what a sum of contributions holds
OTHER = "use --privacy.unit client, or another --algorithm, such as pfedmoe, fedavg or fedrep"


def of(
    comm: Comm,
    settings: Config,
    method: Algorithm,
    sizes: Mapping[str, int],
    stream: Stream | None,
    loaded: Checkpoint | None,
) -> SamplePrivacy | None:
    """Return the settings of DP-SGD, None without; collective.

    `privacy.epsilon` is solved for the noise of the planned rounds; a run that goes on keeps its noise.

    Args:
        sizes: length of each part of the state.

    Raises:
        ConfigError: on all ranks: the method uses samples otherwise, the noise is too large, or
            dp-accounting is not installed.
    """
    privacy = settings.privacy
    if privacy.unit != "sample":
        return None
    _check_method(settings.method, method, sizes)
    found = SamplePrivacy(privacy.clip, privacy.noise, privacy.sampling == "poisson", frozenset(method.apart))
    known = noise_of(loaded, settings)
    noise = comm.from_root(lambda: _noise(settings, method, found, stream, known), "accountant")
    check_noise(privacy, noise, MOST_NOISE / privacy.clip)
    return replace(found, noise=noise)


def _noise(
    settings: Config, method: Algorithm, found: SamplePrivacy, stream: Stream | None, known: float | None
) -> float:
    """Return privacy.noise, or what privacy.epsilon needs: the noise of the rounds so far if it is known.

    Raises:
        ConfigError: dp-accounting is missing.
    """
    privacy = settings.privacy
    accountant.check()
    if not privacy.epsilon:
        return privacy.noise
    if known is not None:
        return known
    accounts = SampleAccounts(settings, method, found)
    for round in range(1, settings.rounds + 1):
        accounts.add(method.cohort(round), _samples(method.task, stream, round))
    return accounts.noise(privacy.epsilon, privacy.delta)


def _samples(task: Task, stream: Stream | None, round: int) -> np.ndarray:
    """Return every client's training samples in a round, (N,)."""
    counts: np.ndarray = stream.counts(round) if stream else task.counts
    return counts.sum(axis=1)


def _check_method(name: str, method: Algorithm, sizes: Mapping[str, int]) -> None:
    """Refuse a method whose clients use samples otherwise than by gradients of single ones.

    Raises:
        ConfigError: with the reason.
    """
    classes = any(block.weight.startswith("class") for block in method.payload(sizes).values())
    reasons = (
        method.beyond_gradients,
        "clients tell which classes they hold" if classes else "",
        "clients send values before round 1" if method.prepared_size else "",
    )
    reason = next(filter(None, reasons), "")
    if reason:
        raise ConfigError(f"privacy.unit = sample does not protect {name}: {reason}", OTHER)


class Account:
    """ε after each round; rank 0 computes it, because the library takes memory."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._round = 0
        self._accounts = SampleAccounts(federation.config, federation.method, privacy_of(federation))

    def entry(self, round: int) -> dict[str, Any]:
        """Return what a row says of privacy after a round; ε is null where it is infinite."""
        federation, settings = self._federation, self._federation.config.privacy
        for each in range(self._round + 1, round + 1):
            samples = _samples(federation.task, federation.stream, each)
            self._accounts.add(federation.method.cohort(each), samples)
        self._round = round
        noise = privacy_of(federation).noise
        found = self._accounts.spent(noise, settings.delta)
        sent, private = (each if math.isfinite(each) else None for each in found)
        return {
            "unit": "sample",
            "noise": noise,
            "delta": settings.delta,
            "epsilon": sent,
            "epsilon_private": private,
        }


def privacy_of(federation: Federation) -> SamplePrivacy:
    """Return the settings of DP-SGD in a federation that has it."""
    assert federation.engine.samples
    return federation.engine.samples


def check(comm: Comm, federation: Federation) -> None:
    """Try a step of every architecture and role; collective.

    Raises:
        ConfigError: on all ranks: DP-SGD does not protect the clients.
    """
    if not federation.engine.samples:
        return

    def try_all() -> None:
        for client, role in trial.members(federation):
            try_member(federation, client, role)

    comm.attempt(try_all, "trial steps")


def try_member(federation: Federation, client: Client, role: str) -> None:
    """Let a client train on a few samples, and compare the batch's gradients with those of its samples.

    Raises:
        ConfigError: they differ, or the client step uses samples otherwise.
    """
    method, engine = federation.method, federation.engine
    assert engine.samples
    privacy = replace(engine.samples, clip=1.0, noise=0.0, poisson=False, compare=True)
    engine = replace(engine, poll=lambda: None, kept=None, graphs=None, samples=privacy)
    few = {name: split.rows(slice(0, FEW)) for name, split in client.splits.items()}
    parts = federation.parts(client, federation.workbench.initial(method.state()))
    _check_norms(method, parts, role)
    second = 2  # some methods read samples from their second round on
    turn = Turn(engine, method.loss, replace(client, splits=few), parts, second, role)
    name = federation.config.method
    try:
        method.client_step(turn)
    except NotFiniteError:  # few samples and initial values may diverge
        return
    except NotPerSampleError as error:
        raise ConfigError(f"privacy.unit = sample does not protect {name}: {error}", OTHER) from error
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        kinds = ", ".join(dict.fromkeys(part.kind for part in client.spec.values()))
        raise ConfigError(
            f"privacy.unit = sample, but {name} with {kinds or federation.task.pool[0]} has no gradient for "
            f"each sample alone: {first}",
            "use a --model.pool without dropout, such as cnn1 to cnn5, or --privacy.unit client",
        ) from error
    if turn.trained != list(method.phases(role)):
        raise ConfigError(
            f"privacy.unit = sample counts the phases that `phases` of {name} returns, but its client step "
            "trains others",
            "let `client_step` train what `phases` returns",
        )


def _check_norms(method: Algorithm, parts: Parts, role: str) -> None:
    """Refuse layers in trained parts that normalise over the samples of a batch.

    Raises:
        ConfigError: names the part, and what is without such layers.
    """
    for phase in method.phases(role):
        parts.train(phase.lr.keys())
        for name in phase.lr:
            modules = parts.modules()[name].modules()
            norms = [m for m in modules if m.training and isinstance(m, _BatchNorm | SwitchNorm)]
            if norms:
                raise ConfigError(
                    f"privacy.unit = sample needs the gradient of each sample alone, but "
                    f"{type(norms[0]).__name__} in {name} mixes the samples of a batch",
                    "use --gate.input_norm layer --gate.batch_norm false"
                    if name == "gate"
                    else "use a --model.pool without it, such as cnn1 to cnn5, or --model.train head",
                )
