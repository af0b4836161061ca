"""Measuring clients' models: accuracy, loss, AUC and gate weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.core import batches
from pfedmoe_mpi.core.batches import Split
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.fixedpoint import SCALE
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Engine
from pfedmoe_mpi.errors import StoppedError
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.metrics import CLIENT_METRICS, EvaluationSum
from pfedmoe_mpi.mpi.comm import Comm


@dataclass(frozen=True)
class Measured:
    """One client measured on one split; `alpha` is the mean gate weight of the shared experts together.

    `auc` is NaN unless the task has two classes and the split samples of both.
    `gate` int64 (2, classes), on the CPU: by class the samples, and Σ α·2^SCALE of them; None without gate.
    """

    correct: int
    samples: int
    loss: float
    alpha: float
    auc: float
    gate: torch.Tensor | None


def evaluate(
    comm: Comm, federation: Federation, state: torch.Tensor, round: int, due: bool = True
) -> EvaluationSum:
    """Return this rank's share of an evaluation after `round`: its clients with the server's `state`.

    Without `due` nobody is measured. A stop leaves the remaining clients out and is requested in the sum.
    """
    task = federation.task
    result = EvaluationSum(task.clients, comm.size, task.classes)
    try:
        for client in federation.clients.values() if due else ():
            comm.poll()
            with comm.located(f"evaluation of client {client.id}, round {round}"):
                result.clients[client.id] = _client_metrics(federation, client, state, round, result.gates)
    except StoppedError:
        pass
    if comm.stop_requested():
        result.request_stop()
    return result


def _client_metrics(
    federation: Federation, client: Client, state: torch.Tensor, round: int, gates: np.ndarray
) -> list[float]:
    """Return CLIENT_METRICS; zeros where the method has no answer for a client that has not trained.

    Adds the weights of a client's gate to `gates`; one that is as it was initialised has no weight α.
    """
    parts = federation.parts(client, state)
    unseen = client.id in federation.task.absent(round)
    splits = [client.splits["test"], client.splits["validation"]]
    splits += federation.stream.concepts(client) if federation.stream else [splits[0].nothing()] * 2
    answers = [measure(federation.engine, federation.method, parts, split, unseen) for split in splits]
    measured = [answer for answer in answers if answer]
    if not measured:
        return [0.0] * len(CLIENT_METRICS)
    test = measured[0]
    alpha = float("nan") if unseen else test.alpha
    if test.gate is not None and not unseen:
        gates += test.gate.numpy()
    counts = [number for other in measured[1:] for number in (other.correct, other.samples)]
    return [test.correct, test.samples, test.loss, alpha, test.auc, *counts]


def inputs(engine: Engine, split: Split) -> Iterator[torch.Tensor]:
    """A split's samples (B, *shape), normalised, without labels."""
    for batch in batches.batches(split, engine.evaluation_batch, engine.normalise):
        engine.poll()
        yield batch.x


def measure(
    engine: Engine, method: Algorithm, parts: Parts, split: Split, unseen: bool = False
) -> Measured | None:
    """Accuracy, mean cross-entropy, mean gate weight and AUC of a client's answers on a split.

    None where the method has no answer for a client that never trained.
    """
    correct = torch.zeros((), dtype=torch.int64, device=engine.device)
    loss = torch.zeros((), dtype=torch.float64, device=engine.device)
    alpha = torch.zeros((), dtype=torch.float64, device=engine.device)
    scores: list[torch.Tensor] = []  # of class 1 against class 0
    gate: torch.Tensor | None = None
    for module in parts.modules().values():
        module.eval()
    with torch.no_grad(), engine.autocast():
        answer = method.answer(parts, partial(inputs, engine, split), unseen)
        if answer is None:
            return None
        for batch in batches.batches(split, engine.evaluation_batch, engine.normalise):
            engine.poll()
            logits = answer(batch.x).float()
            correct += (logits.argmax(1) == batch.y).sum()
            loss += nn.functional.cross_entropy(logits, batch.y, reduction="sum").double()
            weights = method.weights(parts, batch.x)
            alpha += float("nan") if weights is None else weights[:, :-1].double().sum()
            if weights is not None:
                found = _by_class(weights[:, :-1].double().sum(1), batch.y, logits.shape[1])
                gate = found if gate is None else gate + found
            if logits.shape[1] == 2:
                scores.append(logits[:, 1] - logits[:, 0])
    n = len(split)
    ranked = auc(torch.cat(scores).cpu().numpy(), split.y.cpu().numpy()) if scores else math.nan
    mean_loss, mean_alpha = (float(total) / n if n else math.nan for total in (loss, alpha))
    return Measured(int(correct), n, mean_loss, mean_alpha, ranked, None if gate is None else gate.cpu())


def _by_class(alpha: torch.Tensor, y: torch.Tensor, classes: int) -> torch.Tensor:
    """Integers, so that no order of clients and batches matters; α that are not finite are left out."""
    finite = alpha.isfinite()
    numbers = torch.stack([finite.double(), torch.where(finite, alpha, 0.0) * 2.0**SCALE])
    return torch.zeros((2, classes), dtype=torch.int64, device=y.device).index_add_(
        1, y, numbers.round().long()
    )


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a sample of class 1 scores above one of class 0, ties counting half.

    By midranks (Mann-Whitney): whole numbers up to the one division, so that the order of samples and the
    number of batches change no bit. NaN where a class has no sample or a score is not a number.

    Args:
        scores: (n,), larger where class 1 is likelier.
        labels: (n,) of 0 and 1.
    """
    positive = labels == 1
    ones = int(positive.sum())
    zeros = len(labels) - ones
    if not ones or not zeros or np.isnan(scores).any():
        return math.nan
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    twice_midrank = 2 * np.cumsum(count) - count + 1
    return (int(twice_midrank[place][positive].sum()) - ones * (ones + 1)) / (2 * ones * zeros)
