"""The work of a method before round 1: training on reserved rows, and deriving values from every client."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from pfedmoe_mpi.core.fixedpoint import NotFiniteError
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.errors import ConfigError, StoppedError
from pfedmoe_mpi.federation.evaluation import inputs
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.mpi.comm import Comm


@contextmanager
def _patient(comm: Comm, federation: Federation) -> Iterator[None]:
    """Let ranks wait without a limit, because this work may take any time, unless `run.timeout` sets one."""
    before, comm.timeout = comm.timeout, federation.config.run.timeout or math.inf
    try:
        yield
    finally:
        comm.timeout = before


def pretrain(comm: Comm, federation: Federation, state: torch.Tensor) -> str | None:
    """Let the method fill the server's vector, in place, on rank 0, and broadcast it; collective.

    Returns:
        the method's line on how it went, empty if it has nothing to do; None if stopped: then nothing is
        changed, and a restart does it again.

    Raises:
        UserError: on all ranks: the method's files cannot be used, or the training diverged.
    """
    if federation.reserved is None:
        return ""
    with _patient(comm, federation):
        line: str | None = comm.from_root(partial(_pretrain_on_root, federation, state), "pretraining")
    if line is not None:
        comm.broadcast(state.numpy(), "pretrained state")
    return line


def _pretrain_on_root(federation: Federation, state: torch.Tensor) -> str | None:
    """Train the server's parts on the reserved rows; return the method's line, None if stopped."""
    method, bench = federation.method, federation.workbench
    assert federation.reserved
    parts = bench.parts((method.state(), state))
    engine = replace(federation.engine, samples=None)  # these rows are the server's
    try:
        line = method.pretrain(Turn(engine, method.loss, federation.reserved, parts, 0, "server"))
    except StoppedError:
        return None
    except NotFiniteError as error:
        raise ConfigError(
            "the training before round 1 diverged: its loss or its gradient is not finite",
            "lower --train.lr_shared, or set --train.clip",
        ) from error
    parts.check()
    bench.read(method.state(), parts, state)
    return line


def prepare(comm: Comm, federation: Federation, state: torch.Tensor) -> bool:
    """Gather, bit for bit, what the method derives from every client's samples and the state; collective.

    The result is `method.prepared`, float32 (clients, prepared_size). Return False if stopped.
    """
    method = federation.method
    if not method.prepared_size:
        return True
    gathered = np.zeros(1 + federation.task.clients * method.prepared_size, np.int64)
    try:
        _prepare_clients(comm, federation, state, gathered[1:].reshape(federation.task.clients, -1))
    except StoppedError:
        gathered[0] = 1
    with _patient(comm, federation):
        comm.sum(gathered, "preparation")
    rows = gathered[1:].astype(np.int32).reshape(federation.task.clients, -1)
    method.prepared = torch.from_numpy(rows).view(torch.float32)
    return not gathered[0]


def _prepare_clients(comm: Comm, federation: Federation, state: torch.Tensor, rows: np.ndarray) -> None:
    """Write the float32 bits of this rank's clients' values, each client's into its row."""
    method, engine = federation.method, federation.engine
    with torch.no_grad(), engine.autocast():
        for client in federation.clients.in_store_order(federation.clients):
            with comm.located(f"preparation of client {client.id}", alone=True):
                parts = federation.parts(client, state)
                for module in parts.modules().values():
                    module.eval()
                values = method.prepare(parts, partial(inputs, engine, client.splits["train"]))
                rows[client.id] = values.float().cpu().view(torch.int32).numpy()
