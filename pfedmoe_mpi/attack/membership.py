"""Membership inference: does a model's loss on a row tell whether it was trained on it?

The loss threshold of Yeom, Giacomelli, Fredrikson and Jha 2018: a row counts as a member if its loss is at
most the mean loss of the training rows. Members are the training rows of clients that have trained, the
others their test rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pfedmoe_mpi.attack import shadows as lira
from pfedmoe_mpi.attack.rates import rates
from pfedmoe_mpi.attack.target import shared_parts
from pfedmoe_mpi.core.batches import Split
from pfedmoe_mpi.core.seeds import numpy_generator
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation.evaluation import inputs
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.loop import Loop
from pfedmoe_mpi.models.registry import Model

WORST = 1e6  # the loss of a model that is not finite
PENALTY = 1e-3  # on the squares of the probe's weights
PROBE_STEPS = 100
LEAST = 20  # rows that a probe is trained on


def trained_clients(loop: Loop, *left_out: str) -> list[int]:
    """Return the clients that trained in any round and were not in these lists of its row, ascending."""
    found = set()
    for row in loop.history:
        found |= set(row["cohort"]).difference(*(row.get(name, ()) for name in left_out))
    return sorted(found)


def attack(loop: Loop, shadows: int) -> dict[str, Any]:
    """Return what the attack reaches on the clients' models, and on the shared part if there is one.

    Args:
        shadows: number of shadow runs to train for the likelihood ratio; 0 for none.

    Raises:
        ConfigError: no client has trained or has test rows, or the training rows change between rounds.
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
    found = {"clients": _clients(loop, clients), "shared": _shared(loop)}
    if shadows:
        found["clients"]["likelihood_ratio"] = lira.attack(loop, clients, shadows, _losses_of_client)
    return found


# The clients' models


def _clients(loop: Loop, clients: Sequence[int]) -> dict[str, Any]:
    """Return the attack on each client's whole model, and on the scores of all clients together.

    Scores are centred at each client's own threshold, so that one threshold, 0, holds for all.
    """
    found: list[dict[str, Any]] = []
    members: list[np.ndarray] = []
    others: list[np.ndarray] = []
    for client in clients:
        train, test = (-each for each in _losses_of_client(loop, client))
        centre = float(train.mean())
        members.append(train - centre)
        others.append(test - centre)
        found.append({"client": client, **rates(members[-1], others[-1], 0.0)})
    pooled = rates(np.concatenate(members), np.concatenate(others), 0.0)
    return {"pooled": pooled, "by_client": found}


def _losses_of_client(loop: Loop, client: int) -> list[np.ndarray]:
    """Return the losses of a client's model on its training rows and on its test rows."""
    federation = loop.federation
    own = federation.clients[client]
    parts = federation.parts(own, loop.state)
    result = []
    for name in ("train", "test"):
        split = own.splits[name]
        for module in parts.modules().values():
            module.eval()
        with torch.no_grad(), federation.engine.autocast():
            samples = partial(inputs, federation.engine, split)
            predict = federation.method.predictor(parts, samples, False)
            assert predict, "a method answers for clients that have trained"
            result.append(_losses(federation, split, predict))
    return result


def _losses(federation: Federation, split: Split, predict: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Return the cross-entropy of every row of a split, float64 (n,)."""
    losses = [
        nn.functional.cross_entropy(predict(batch.x).double(), batch.y, reduction="none")
        for batch in federation.engine.batches(split)
    ]
    return torch.cat(losses).nan_to_num(WORST).clamp(max=WORST).cpu().numpy()


# The shared part


def _shared(loop: Loop) -> dict[str, Any]:
    """Return the attack on the shared module, or the reason why there is none.

    A shared model answers by its own head. On the outputs of a shared extractor the attacker trains a linear
    head with half of the rows that no client trained on; the other half are the non-members.
    """
    federation = loop.federation
    name = next(iter(shared_parts(federation)), None)
    if name is None:
        return {"reason": "clients share no module that takes samples"}
    train, test = federation.partition.train, federation.partition.test
    trained = trained_clients(loop, "dropped", "lost", "late")
    held_out = [*test, *(train[client] for client in sorted(federation.task.unseen))]
    rows = [np.concatenate([train[client] for client in trained]), np.concatenate(held_out)]
    draw = numpy_generator(federation.config.seed, "attack/shadow rows")
    shadow, rest = np.array_split(draw.permutation(rows[1]), 2)
    if min(len(shadow), len(rest)) < LEAST:
        return {"reason": f"fewer than {2 * LEAST} rows that no client trained on"}
    own = federation.clients[trained[0]]
    parts = federation.parts(own, loop.state)
    module = parts.modules()[name].eval()
    whole = isinstance(module, Model)
    splits = [_split(federation, np.sort(chosen)) for chosen in (shadow, rows[0], rest)]
    with torch.no_grad(), federation.engine.autocast():
        outputs = [_outputs(federation, split, module) for split in splits]
    labels = [split.y.cpu() for split in splits]
    if not whole:
        outputs = _probed(outputs, labels[0], federation.task.classes)
    losses = [
        nn.functional.cross_entropy(each, y, reduction="none").numpy()
        for each, y in zip(outputs, labels, strict=True)
    ]
    threshold = float(losses[1].mean() if whole else losses[0].mean())
    found = rates(-losses[1], -losses[2], -threshold)
    return {"part": name, "head": "its own" if whole else "a probe of the attacker", **found}


def _split(federation: Federation, rows: np.ndarray) -> Split:
    data = federation.dataset
    return Split.of(data.rows(rows), data.labels[rows], federation.engine.device)


def _outputs(federation: Federation, split: Split, module: nn.Module) -> Tensor:
    """Return the module's outputs for every row, float64 on the CPU."""
    return torch.cat([module(batch.x).double().cpu() for batch in federation.engine.batches(split)])


def _probed(outputs: Sequence[Tensor], labels: Tensor, classes: int) -> list[Tensor]:
    """Return logits of a linear head that is trained on the first of these outputs."""
    first = outputs[0]
    mean, std = first.mean(0), first.std(0).clamp(min=1e-6)
    scaled = [(each - mean) / std for each in outputs]
    weight = torch.zeros(first.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=PROBE_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = nn.functional.cross_entropy(scaled[0] @ weight[:-1] + weight[-1], labels)
        value = value + PENALTY * (weight[:-1] ** 2).sum()
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        return [each @ weight[:-1] + weight[-1] for each in scaled]
