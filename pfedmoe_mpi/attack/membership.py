"""Membership inference: does a model's loss on a row tell whether it was trained on it?

The loss threshold of Yeom, Giacomelli, Fredrikson and Jha 2018: a row counts as a member if its loss is at
most the mean loss of the training rows. Members are the training rows of clients that have trained, the
others their test rows. With shadow runs also the likelihood ratio of `likelihood.py`. Attacked are the
clients' whole models, and the shared part alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pfedmoe_mpi.attack import likelihood, shared_part
from pfedmoe_mpi.attack.likelihood import Losses
from pfedmoe_mpi.attack.rates import rates
from pfedmoe_mpi.attack.shadows import Shadows, client_rows
from pfedmoe_mpi.attack.shared_part import WORST
from pfedmoe_mpi.attack.target import trained_clients
from pfedmoe_mpi.core.batches import Split
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation.evaluation import inputs
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.loop import Loop


def attack(loop: Loop, shadows: Shadows | None) -> dict[str, Any]:
    """Return what the attack reaches on the clients' models, and on the shared part if there is one.

    Raises:
        UserError: no client has trained or has test rows, the training rows change between rounds, or the
            shadow runs cannot be used.
    """
    federation = loop.federation
    if federation.stream:
        kind = federation.config.stream.kind
        raise ConfigError(
            f"stream.kind = {kind}: the training rows of a client change between rounds, so members are not "
            "one set",
            "attack a run with stream.kind = none",
        )
    clients = [
        client
        for client in trained_clients(loop, "dropped")
        if all(len(rows[client]) for rows in (federation.partition.train, federation.partition.test))
    ]
    if not clients:
        raise ConfigError("no client has trained and has test rows", "name a checkpoint of a later round")
    by_client = {client: _client_losses(loop, client) for client in clients}
    shared = shared_part.losses(loop)
    found: dict[str, Any] = {"clients": _clients(by_client), "shared": _shared(loop, shared)}
    if shadows:
        ratio_of_clients, ratio_of_shared = _likelihood_ratios(loop, by_client, shared, shadows)
        found["clients"]["likelihood_ratio"] = ratio_of_clients
        if ratio_of_shared:
            found["shared"]["likelihood_ratio"] = ratio_of_shared
    return found


def _clients(by_client: Mapping[int, Losses]) -> dict[str, Any]:
    """Return the attack on each client's whole model, and on the scores of all clients together.

    Scores are centred at each client's own threshold, so that one threshold, 0, holds for all.
    """
    found = [{"client": client, **losses.rates(losses.threshold)} for client, losses in by_client.items()]
    scores = [(losses.threshold - losses.loss, losses.trained) for losses in by_client.values()]
    members, others = (np.concatenate([s[t == kind] for s, t in scores]) for kind in (True, False))
    return {"pooled": rates(members, others, 0.0), "by_client": found}


def _shared(loop: Loop, losses: Losses | str) -> dict[str, Any]:
    """Return the attack on the shared module, or the reason why there is none."""
    if isinstance(losses, str):
        return {"reason": losses}
    name, head = shared_part.head_of(loop)
    return {"part": name, "head": head, **losses.rates(losses.threshold)}


def _likelihood_ratios(
    loop: Loop, by_client: Mapping[int, Losses], shared: Losses | str, shadows: Shadows
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what likelihood ratios reach on the clients' models and on the shared part, if it is attacked.

    The clients' models need shadow runs in which every client has the same rows.

    Raises:
        ConfigError: the shadow runs tell nothing of either.
    """
    of_clients: dict[int, list[Losses]] = {client: [] for client in by_client}
    of_shared: list[Losses] = []
    same_rows = True
    for shadow in shadows.loops(sorted(by_client)):
        same_rows &= all(
            np.array_equal(client_rows(loop.federation, k), client_rows(shadow.federation, k))
            for k in by_client
        )
        for client in set(trained_clients(shadow, "dropped")) & set(by_client) if same_rows else ():
            of_clients[client].append(_client_losses(shadow, client))
        losses = "" if isinstance(shared, str) else shared_part.losses(shadow)
        of_shared += [] if isinstance(losses, str) else [losses]
    pairs = [(own, of_clients[client]) for client, own in by_client.items() if of_clients[client]]
    ratios = [likelihood.attack(pairs, shadows.number)]
    if not same_rows:
        ratios = [{"shadows": shadows.number, "reason": "clients have other rows in the shadow runs"}]
    if not isinstance(shared, str):
        ratios.append(likelihood.attack([(shared, of_shared)] if of_shared else [], shadows.number))
    if all("reason" in each for each in ratios):
        raise ConfigError(
            f"--shadows: {ratios[-1]['reason']}",
            "add runs whose clients have the same rows and other test rows: --partition.file and --seed",
        )
    return ratios[0], ratios[1] if ratios[1:] else {}


def _client_losses(loop: Loop, client: int) -> Losses:
    """Return the losses of a client's model on its training rows and on its test rows."""
    federation = loop.federation
    own = federation.clients[client]
    parts = federation.parts(own, loop.state)
    found = []
    for name, rows in (("train", federation.partition.train), ("test", federation.partition.test)):
        split = own.splits[name]
        for module in parts.modules().values():
            module.eval()
        with torch.no_grad(), federation.engine.autocast():
            samples = partial(inputs, federation.engine, split)
            predict = federation.method.predictor(parts, samples, False)
            assert predict, "a method answers for clients that have trained"
            found.append((rows[client], _losses(federation, split, predict)))
    return Losses.of(*found)


def _losses(federation: Federation, split: Split, predict: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Return the cross-entropy of every row of a split, float64 (n,)."""
    losses = [
        nn.functional.cross_entropy(predict(batch.x).double(), batch.y, reduction="none")
        for batch in federation.engine.batches(split)
    ]
    return torch.cat(losses).nan_to_num(WORST).clamp(max=WORST).cpu().numpy()
