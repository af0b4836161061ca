"""The likelihood-ratio attack: shadow runs with other test rows tell how a row's loss moves if it is trained.

Carlini, Chien, Nasr, Song, Terzis and Tramèr 2022 (LiRA), online with one variance for all rows of a client.
Every shadow run has the settings of the run and its seed, which is published with it, and each client's rows
are divided anew into training and test rows of the same numbers; over the runs every row is a test row about
equally often.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pfedmoe_mpi import config
from pfedmoe_mpi.attack.rates import rates
from pfedmoe_mpi.config.partition_settings import DRAWN
from pfedmoe_mpi.core.rows import Rows
from pfedmoe_mpi.core.seeds import numpy_generator
from pfedmoe_mpi.data import Partition
from pfedmoe_mpi.data.partition_file import write_rows
from pfedmoe_mpi.errors import ConfigError, StoppedError
from pfedmoe_mpi.federation.build import build
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.loop import Loop, SilentObserver

PURPOSE = "attack/shadow"
Losses = Callable[[Loop, int], Sequence[np.ndarray]]  # of a client's training rows and test rows


def attack(loop: Loop, clients: Sequence[int], shadows: int, losses: Losses) -> dict[str, Any]:
    """Train the shadow runs for as many rounds, and return the rates over all clients together.

    Raises:
        ConfigError: with so few runs some row would be a training row in all of them.
    """
    federation = loop.federation
    needed = max(math.ceil(_rows(federation, k).size / len(federation.partition.test[k])) for k in clients)
    if shadows < needed:
        raise ConfigError(
            f"--shadows {shadows}, but only {needed} shadow runs test every row once", f"--shadows {needed}"
        )
    own = {client: _scores(loop, client, losses) for client in clients}
    seen: dict[int, list[np.ndarray]] = {client: [] for client in clients}
    for number in range(shadows):
        print(f"shadow run {number + 1} of {shadows}", file=sys.stderr, flush=True)
        shadow = _trained(loop, number)
        for client in clients:
            seen[client].append(_scores(shadow, client, losses))
    ratios = [_ratios(own[client], np.stack(seen[client])) for client in clients]
    members, others = (np.concatenate([pair[place] for pair in ratios]) for place in (0, 1))
    return {"shadows": shadows, **rates(members, others, 0.0)}


def _rows(federation: Federation, client: int) -> np.ndarray:
    """Return a client's training and test rows, ascending."""
    partition = federation.partition
    return np.sort(np.concatenate([partition.train[client], partition.test[client]]))


def _scores(loop: Loop, client: int, losses: Losses) -> np.ndarray:
    """Return (2, rows) of `_rows`: log(p / (1 − p)) of the true class, and 1 where the row was trained."""
    partition = loop.federation.partition
    loss = np.concatenate(losses(loop, client))
    order = np.argsort(np.concatenate([partition.train[client], partition.test[client]]), kind="stable")
    trained = np.repeat([1.0, 0.0], [len(partition.train[client]), len(partition.test[client])])
    confidence = -loss - np.log(-np.expm1(-np.maximum(loss, 1e-12)))
    return np.stack([confidence, trained])[:, order]


def _ratios(own: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the log likelihood ratios of a client's members and of the others.

    Args:
        own: (2, rows) of the attacked model; seen: (shadows, 2, rows) of the shadow models.
    """
    values, trained = seen[:, 0], seen[:, 1]
    logs = []
    for inside in (trained == 1, trained == 0):
        mean = np.where(inside, values, 0).sum(0) / inside.sum(0)
        freedom = max(1, int(inside.sum()) - inside.shape[1])
        variance = np.where(inside, (values - mean) ** 2, 0).sum() / freedom + 1e-6
        logs.append(-((own[0] - mean) ** 2) / (2 * variance) - 0.5 * math.log(variance))
    ratio = logs[0] - logs[1]
    return ratio[own[1] == 1], ratio[own[1] == 0]


def _trained(loop: Loop, number: int) -> Loop:
    """Return the loop of a shadow run after as many rounds.

    Raises:
        StoppedError: a stop was asked for.
    """
    federation = loop.federation
    before = federation.config
    fields = config.fields(before.algorithm)
    flat = {**config.flatten(config.to_tree(before)), "run.dir": ""}
    flat |= {f"partition.{name}": fields[f"partition.{name}"].default for name in DRAWN}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "split.h5"
        write_rows(path, _divided(federation, number), federation.dataset.labels, before)
        flat |= {"partition.kind": "file", "partition.file": str(path)}
        shadow = Loop(loop.comm, build(loop.comm, config.build(flat), warn=False), SilentObserver(), None)
    if not shadow.begin():
        raise StoppedError
    for _ in range(loop.round):
        if not shadow.run_round():
            raise StoppedError
    return shadow


def _divided(federation: Federation, number: int) -> Partition:
    """Return the partition with other test rows for each client that trains.

    A client's rows have one drawn order; the test rows of the runs follow each other in it, all round.
    """
    partition = federation.partition
    train, test = list(partition.train), list(partition.test)
    for client in federation.task.training:
        rows = _rows(federation, client)
        order = numpy_generator(federation.config.seed, PURPOSE, 0, client).permutation(len(rows))
        first = number * len(test[client])
        places = order.take(np.arange(first, first + len(test[client])), mode="wrap")
        chosen = np.isin(np.arange(len(rows)), places)
        train[client], test[client] = rows[~chosen], rows[chosen]
    return replace(partition, train=Rows.of(train), test=Rows.of(test))
