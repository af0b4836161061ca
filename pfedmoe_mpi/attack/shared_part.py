"""Membership in the shared part: what an observer learns who has the shared module and no client's model.

A row is a member if a client trained on it whose contribution was in a sum. A shared model answers by its own
head. For a shared extractor the attacker trains linear heads on its outputs for rows that no client trained
on: all rows are divided into two halves, and a row is scored by the head of the other half, whether a member
or not, so that no head has seen a row that it scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pfedmoe_mpi.attack.likelihood import Losses
from pfedmoe_mpi.attack.target import shared_parts, trained_clients
from pfedmoe_mpi.core.batches import Split
from pfedmoe_mpi.core.seeds import numpy_generator
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.loop import Loop
from pfedmoe_mpi.models.registry import Model

WORST = 1e6  # the loss of a model that is not finite
PENALTY = 1e-3  # on the squares of the probe's weights
PROBE_STEPS = 100
LEAST = 20  # rows that a probe is trained on
HALVES = (0, 1)


def head_of(loop: Loop) -> tuple[str, str]:
    """Return the shared part that is attacked and whose head answers; empty if there is none."""
    name = next(iter(shared_parts(loop.federation)), "")
    return name, "its own" if name and isinstance(_module(loop, name), Model) else "a probe of the attacker"


def losses(loop: Loop) -> Losses | str:
    """Return the losses on the shared part, or the reason why it is not attacked."""
    federation = loop.federation
    name, _ = head_of(loop)
    if not name:
        return "clients share no module that takes samples"
    train, test = federation.partition.train, federation.partition.test
    trained = trained_clients(loop, "dropped", "lost", "late")
    if not trained:
        return "no client's contribution was in a sum"
    held_out = [*test, *(train[client] for client in sorted(federation.task.unseen))]
    kinds = [np.sort(np.concatenate(each)) for each in ([train[client] for client in trained], held_out)]
    module = _module(loop, name)
    splits = [_split(federation, rows) for rows in kinds]
    with torch.no_grad(), federation.engine.autocast():
        outputs = [_outputs(federation, split, module) for split in splits]
    labels = [split.y.cpu() for split in splits]
    if not isinstance(module, Model):
        if len(kinds[1]) < 2 * LEAST:
            return f"fewer than {2 * LEAST} rows that no client trained on"
        draw = numpy_generator(federation.config.seed, "attack/halves")
        places = [torch.from_numpy(draw.permutation(len(rows)) % 2) for rows in kinds]
        outputs = _probed(outputs, labels[1], places, federation.task.classes)
    members, others = (
        (rows, _cross_entropy(each, y)) for rows, each, y in zip(kinds, outputs, labels, strict=True)
    )
    return Losses.of(members, others)


def _module(loop: Loop, name: str) -> nn.Module:
    federation = loop.federation
    return federation.workbench.parts((federation.method.state(), loop.state)).modules()[name].eval()


def _split(federation: Federation, rows: np.ndarray) -> Split:
    data = federation.dataset
    return Split.of(data.rows(rows), data.labels[rows], federation.engine.device)


def _outputs(federation: Federation, split: Split, module: nn.Module) -> Tensor:
    """Return the module's outputs for every row, float64 on the CPU."""
    return torch.cat([module(batch.x).double().cpu() for batch in federation.engine.batches(split)])


def _cross_entropy(logits: Tensor, labels: Tensor) -> np.ndarray:
    found = nn.functional.cross_entropy(logits, labels, reduction="none")
    return found.nan_to_num(WORST).clamp(max=WORST).numpy()


def _probed(
    outputs: Sequence[Tensor], labels: Tensor, places: Sequence[Tensor], classes: int
) -> list[Tensor]:
    """Return logits of members and others, each row's by the head that was trained on the other half.

    Args:
        outputs: of members and of others.
        labels: of the others, on which heads are trained.
        places: the half of each member and of each other.
    """
    found = [torch.empty(len(each), classes, dtype=torch.float64) for each in outputs]
    for half in HALVES:
        seen = places[1] == half
        answer = _head(outputs[1][seen], labels[seen], classes)
        for each, place, logits in zip(outputs, places, found, strict=True):
            logits[place != half] = answer(each[place != half])
    return found


def _head(outputs: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Return a linear head that was trained on these outputs (n, d): it maps outputs to logits."""
    mean, std = outputs.mean(0), outputs.std(0).clamp(min=1e-6)
    weight = torch.zeros(outputs.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=PROBE_STEPS, line_search_fn="strong_wolfe")

    def answer(each: Tensor) -> Tensor:
        return (each - mean) / std @ weight[:-1] + weight[-1]

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = nn.functional.cross_entropy(answer(outputs), labels) + PENALTY * (weight[:-1] ** 2).sum()
        value.backward()
        return value

    optimiser.step(loss)
    weight.requires_grad_(False)
    return answer
