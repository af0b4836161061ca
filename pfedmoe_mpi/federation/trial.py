"""A client step of every architecture with a few samples on a GPU, before round 1, to find what fails there.

Its result is dropped. On a CPU nothing is tried.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch

from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.fixedpoint import NotFiniteError
from pfedmoe_mpi.core.parts import Module, Spec
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation import evaluation
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.mpi.comm import Comm

ROUNDS = 20  # whose cohorts are looked through for every role


def check(comm: Comm, federation: Federation) -> None:
    """Try this rank's architectures on its GPU; collective.

    Raises:
        ConfigError: on all ranks: an operation has no deterministic kernel, or memory does not suffice.
    """

    def try_all() -> None:
        if federation.device.device.type == "cuda":
            for client, role in members(federation):
                try_member(federation, client, role)

    comm.attempt(try_all, "trial steps")


def members(federation: Federation) -> Iterator[tuple[Client, str]]:
    """Yield one of this rank's clients, and its role, for every architecture and role.

    After the first cohorts, later ones are looked through for the architectures that were not met.
    """
    own = [client for client in federation.task.training if client in federation.clients]
    missing = {_kinds(federation.specs[client]) for client in own}
    tried: set[tuple[str, ...]] = set()
    for round in range(1, federation.config.rounds + 1):
        if round > ROUNDS and not missing:
            return
        for client, role in federation.method.cohort(round):
            if client in federation.clients:
                kinds = _kinds(federation.specs[client])
                missing.discard(kinds)
                if (role, *kinds) not in tried:
                    tried.add((role, *kinds))
                    yield federation.clients[client], role


def _kinds(spec: Spec) -> tuple[str, ...]:
    return tuple(part.kind for part in spec.values())


def try_member(federation: Federation, client: Client, role: str) -> None:
    """Let a client train on one batch, and measure it on another.

    Raises:
        ConfigError: an operation has no deterministic kernel, or the device's memory does not suffice.
    """
    method, train = federation.method, federation.config.train
    engine = replace(federation.engine, poll=lambda: None, kept=None, graphs=None)
    few = {name: split.rows(slice(0, train.batch)) for name, split in client.splits.items()}
    state = federation.workbench.initial(method.state())
    try:
        parts = federation.parts(client, state)
        turn = Turn(engine, method.loss, replace(client, splits=few), parts, 1, role)
        method.client_step(turn)
        evaluation.measure(engine, method, parts, few["test"])
    except NotFiniteError:  # few samples and initial values may diverge
        pass
    except RuntimeError as error:
        raise _refusal(federation, client, error) or error from error


def _refusal(federation: Federation, client: Client, error: RuntimeError) -> ConfigError | None:
    """Return what a user can do about an error of torch, None if nothing."""
    train, task = federation.config.train, federation.task
    models = " and ".join(part.kind for part in client.spec.values() if isinstance(part, Module))
    step = f"a step of {federation.config.method} with {models or task.pool[0]}"
    missing = re.match(r"(\w+) does not have a deterministic implementation", str(error))
    if missing:
        return ConfigError(
            f"train.deterministic = true, but {missing[1]} in {step} has no deterministic kernel",
            "--train.deterministic false runs it, with bits that may differ from run to run; or choose "
            "another --model.pool",
        )
    if isinstance(error, torch.OutOfMemoryError):
        return ConfigError(
            f"train.batch = {train.batch}, but {step} does not fit into the GPU's memory: {error}",
            f"--train.batch {max(2, train.batch // 2)} --train.accumulate {2 * train.accumulate}, or start "
            "fewer ranks per GPU",
        )
    return None
