"""The training of a round's cohort: each member's step, its contribution to the sum, its new vector."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.fixedpoint import NotFiniteError
from pfedmoe_mpi.core.parts import Tensor
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.errors import StoppedError
from pfedmoe_mpi.federation import evaluation, lending, placement
from pfedmoe_mpi.federation.faults import Faults
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.round_sum import DROPPED, IN, RoundSum
from pfedmoe_mpi.federation.store import buffer
from pfedmoe_mpi.log import LOGGER
from pfedmoe_mpi.mpi.comm import Comm


def train_cohort(
    comm: Comm,
    federation: Federation,
    faults: Faults,
    total: RoundSum,
    finished: Sequence[bool],
    state: torch.Tensor,
    round: int,
    tested: bool,
    trained: Callable[[int, int], None] = lambda done, members: None,
) -> float:
    """Train this rank's share of a cohort into the round's sum; collective. Return the seconds of training.

    A stop leaves the remaining members MISSING and is requested in the sum.

    Args:
        finished: for each member, whether an interrupted start of this round has trained it.
        state: the server's vector.
        tested: whether members measure their accuracy after training.
        trained: called after each member of this rank's share with how many are done, and of how many.
    """
    members = zip(total.cohort, finished, strict=True)
    costs = {client: federation.costs[client] for (client, _), done in members if not done}
    trainer = placement.trainers(costs, federation.home, comm.size)
    borrowed = lending.lend(comm, federation, trainer)
    started = time.perf_counter()
    done, share = 0, sum(rank == comm.rank for rank in trainer.values())
    try:
        for position, (client, role) in enumerate(total.cohort):
            if trainer.get(client) == comm.rank:
                comm.poll()
                with comm.located(f"client {client}, round {round}", alone=True):
                    member = _member(federation, client, borrowed)
                    train_member(federation, faults, total, position, member, state, round, role, tested)
                    if total.flags[position] != DROPPED:
                        federation.store.take(client, member.vector)
                done += 1
                trained(done, share)
    except StoppedError:
        pass
    seconds = time.perf_counter() - started
    lending.give_back(comm, federation, trainer)
    if comm.stop_requested() or federation.store.problem:
        total.request_stop()
    return seconds


def _member(federation: Federation, client: int, borrowed: Mapping[int, Client]) -> Client:
    """Return a client of this rank, or one that it borrowed, with its vector from the store."""
    if client not in borrowed:
        return federation.clients[client]
    return replace(borrowed[client], vector=federation.store.get(client))


def train_member(
    federation: Federation,
    faults: Faults,
    total: RoundSum,
    position: int,
    client: Client,
    state: torch.Tensor,
    round: int,
    role: str,
    tested: bool,
) -> None:
    """Train one member, at `position` of the cohort, and add its contribution to the round's sum.

    It has another private vector only if the whole step is done and finite; otherwise the member is DROPPED.

    Raises:
        StoppedError: a stop was asked for; the member's step leaves no trace.
    """
    method, stream = federation.method, federation.stream
    try:
        parts = federation.parts(client, state)
        turn_client = stream.of(client, round) if stream else client
        turn = Turn(federation.engine, method.loss, turn_client, parts, round, role)
        values = method.client_step(turn)
        if not isinstance(values, Mapping):
            raise TypeError(f"client_step returns {values!r}, not the values of the payload by name")
        parts.check()
        accuracy = float("nan")
        if tested:
            measured = evaluation.measure(federation.engine, method, parts, client.splits["test"])
            assert measured
            accuracy = measured.correct / measured.samples if measured.samples else accuracy
        vector = federation.workbench.read(client.spec, parts, buffer(client.vector.numel()))
        _check_private(federation, client, vector)
        fate = faults.fate(round, client.id)
        if fate == IN:
            total.add(position, values, _member_metrics(turn, accuracy, federation.state_layout.size))
        else:
            total.leave_out(position, fate)
        client.vector = vector
    except NotFiniteError as error:
        LOGGER.warning("client %d in round %d: %s", client.id, round, error)
        total.leave_out(position, DROPPED)


def _check_private(federation: Federation, client: Client, vector: torch.Tensor) -> None:
    """Raise NotFiniteError if a client's new vector is not finite, apart from what is still undefined."""
    for name, place in federation.client_layouts[client.id].parts.items():
        part, values = client.spec[name], vector[place]
        if isinstance(part, Tensor) and math.isnan(part.fill):
            values = values.nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf)
        if not bool(values.sum().isfinite()):  # one pass; a sum beyond float32 means a useless model too
            raise NotFiniteError(f"its private part '{name}' is not finite")


def _member_metrics(turn: Turn, accuracy: float, state_size: int) -> dict[str, float]:
    """Return MEMBER_METRICS; without `bytes_up` where it is the size of the payload."""
    bytes_down = 4 * state_size if turn.bytes_down is None else turn.bytes_down
    values = {"train_loss": turn.measured_loss, "accuracy_before": accuracy, "bytes_down": bytes_down}
    return values if turn.bytes_up is None else {**values, "bytes_up": turn.bytes_up}
