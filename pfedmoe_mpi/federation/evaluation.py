"""Measuring clients' models: accuracy, loss, AUC and gate weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from pfedmoe_mpi.algorithms.base import Algorithm, Mixture
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core.batches import Split
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.seeds import numpy_generator
from pfedmoe_mpi.core.turn import Engine
from pfedmoe_mpi.errors import StoppedError
from pfedmoe_mpi.federation import confusion, gates, tuning
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.gates import GateSum
from pfedmoe_mpi.federation.metrics import CLIENT_METRICS, EvaluationSum
from pfedmoe_mpi.mpi.comm import Comm


@dataclass(frozen=True)
class Measured:
    """The metrics of one client on one split.

    `loss` is the mean cross-entropy, `alpha` the mean gate weight of all shared experts together. `auc` is
    NaN unless the task has two classes and the split has samples of both. `gate`: the client's share of the
    sums about gates; None without a gate, or if they were not asked for. `answers` (n,) are the predicted
    classes, int64 on the CPU.
    """

    correct: int
    samples: int
    loss: float
    alpha: float
    auc: float
    gate: GateSum | None
    answers: np.ndarray


def drawn_clients(settings: Config, round: int, cohort: Collection[int]) -> np.ndarray:
    """Return the clients that a round measures, ascending int64: none, all, or those drawn and the cohort.

    Clients are measured every `eval.every` rounds, and in the last. The draw of `eval.clients` is from all
    clients, and the round is part of its address.
    """
    last = round == settings.rounds
    if round % settings.eval.every and not last:
        return np.empty(0, np.int64)
    if settings.drawn_clients == settings.clients or (last and settings.eval.last == "all"):
        return np.arange(settings.clients)
    draw = numpy_generator(settings.seed, "measured", round)
    drawn = draw.choice(settings.clients, settings.drawn_clients, replace=False)
    return np.union1d(drawn, np.array([*cohort], np.int64))


def evaluate(
    comm: Comm, federation: Federation, state: torch.Tensor, round: int, measured: np.ndarray
) -> EvaluationSum:
    """Return this rank's share of an evaluation after `round`: its clients with the server's `state`.

    A stop leaves the remaining clients out and is requested in the sum.

    Args:
        measured: the clients to measure, ascending.
    """
    task = federation.task
    place = {client: number for number, client in enumerate(measured.tolist())}
    result = EvaluationSum(task.clients, comm.size, task.classes, measured, federation.method.experts)
    try:
        for client in federation.clients.in_store_order(
            client for client in federation.clients if client in place
        ):
            comm.poll()
            with comm.located(f"evaluation of client {client.id}, round {round}", alone=True):
                values = _client_metrics(federation, client, state, round, result, place[client.id])
                result.clients[place[client.id]] = values
    except StoppedError:
        pass
    if comm.stop_requested():
        result.request_stop()
    return result


def _client_metrics(
    federation: Federation, client: Client, state: torch.Tensor, round: int, result: EvaluationSum, place: int
) -> list[float]:
    """Return CLIENT_METRICS; zeros if the method gives no answer for a client that has not trained.

    Counts of answers are added to the result at `place`, and what a client's gate does, unless the client is
    unseen or joins later: the weights of an initial gate mean nothing.
    """
    parts = federation.parts(client, state)
    unseen = client.id in federation.task.absent_clients(round)
    splits = [client.splits["test"], client.splits["validation"]]
    splits += federation.stream.concepts(client) if federation.stream else [splits[0].empty()] * 2
    rows = [federation.gate_rows, *[None] * (len(splits) - 1)]
    results = [
        measure(federation.engine, federation.method, parts, split, unseen, common)
        for split, common in zip(splits, rows, strict=True)
    ]
    tuned = _tuned(federation, client, parts)
    measured = [result for result in results if result]
    if not measured:
        return [*[0.0] * (len(CLIENT_METRICS) - len(tuned)), *tuned]
    test = measured[0]
    alpha = float("nan") if unseen else test.alpha
    if test.gate is not None:
        result.gates.buffer += test.gate.buffer
    labels = client.splits["test"].y.cpu().numpy()
    if result.confusion is not None:
        result.confusion[place] = confusion.matrix(labels, test.answers, federation.task.classes)
    counts = [number for other in measured[1:] for number in (other.correct, other.samples)]
    by_class = [f(labels, test.answers) for f in (confusion.macro_f1, confusion.balanced_accuracy)]
    return [test.correct, test.samples, test.loss, alpha, test.auc, *counts, *by_class, *tuned]


def _tuned(federation: Federation, client: Client, parts: Parts) -> tuple[float, float]:
    """Return correct answers and test samples of a client after tuning; zeros for one that is not tuned."""
    if not federation.config.unseen.tune or client.id not in federation.task.unseen:
        return 0.0, 0.0
    if not tuning.tune(federation, client, parts):
        return 0.0, 0.0
    found = measure(federation.engine, federation.method, parts, client.splits["test"])
    return (found.correct, found.samples) if found else (0.0, 0.0)


def inputs(engine: Engine, split: Split) -> Iterator[torch.Tensor]:
    """Yield a split's samples in batches (B, *shape), normalised, without labels."""
    for batch in engine.batches(split):
        yield batch.x


def measure(
    engine: Engine,
    method: Algorithm,
    parts: Parts,
    split: Split,
    unseen: bool = False,
    gate_rows: Split | None = None,
) -> Measured | None:
    """Measure a client's model on a split; None if the method gives no answer for an `unseen` client.

    Args:
        gate_rows: rows that all clients' gates weigh; with them the gate is measured, too.

    Raises:
        StoppedError: a stop was asked for.
    """
    correct = torch.zeros((), dtype=torch.int64, device=engine.device)
    loss = torch.zeros((), dtype=torch.float64, device=engine.device)
    alpha = torch.zeros((), dtype=torch.float64, device=engine.device)
    scores: list[torch.Tensor] = []  # logit of class 1 minus logit of class 0
    kept: list[tuple[Mixture, torch.Tensor]] = []  # with the classes of the samples
    answers: list[torch.Tensor] = []
    for module in parts.modules().values():
        module.eval()
    with torch.no_grad(), engine.autocast():
        samples = partial(inputs, engine, split)
        mixture = None if unseen else method.mixture(parts, samples)
        predict: Any = None if mixture else method.predictor(parts, samples, unseen)
        if mixture is None and predict is None:
            return None
        for batch in engine.batches(split):
            mixed = mixture(batch.x) if mixture else None
            logits = (mixed.answer() if mixed else predict(batch.x)).float()
            answers.append(logits.argmax(1))
            correct += (answers[-1] == batch.y).sum()
            loss += nn.functional.cross_entropy(logits, batch.y, reduction="sum").double()
            shared = mixed.shared if mixed else None
            alpha += float("nan") if shared is None else shared.sum()
            if mixed and gate_rows is not None:
                kept.append((mixed, batch.y))
            if logits.shape[1] == 2:
                scores.append(logits[:, 1] - logits[:, 0])
        gate = None
        if mixture and gate_rows is not None:
            common = engine.batches(gate_rows)
            gate = gates.of_client(method, kept, [mixture(batch.x).weights for batch in common])
    n = len(split)
    area = auc(torch.cat(scores).cpu().numpy(), split.y.cpu().numpy()) if scores else math.nan
    right, *totals = torch.stack([correct.double(), loss, alpha]).tolist()  # waits for the device
    mean_loss, mean_alpha = (total / n if n else math.nan for total in totals)
    classes = torch.cat(answers).cpu().numpy() if answers else np.empty(0, np.int64)
    return Measured(int(right), n, mean_loss, mean_alpha, area, gate, classes)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the chance that a sample of class 1 scores above one of class 0, ties counting half.

    It is computed by midranks (Mann-Whitney), in whole numbers up to one division, so that neither the order
    of samples nor the number of batches changes a bit. NaN if a class has no sample or a score is NaN.

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
