"""Looking into the models of a run: gate weights, representations, one test set for everybody.

All from the newest good checkpoint and the run's data, in this one process. The only room of reports that
needs torch and MPI; its cost is bounded by the constants below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.batches import Split, batches
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.errors import UserError
from pfedmoe_mpi.federation.evaluation import inputs, measure
from pfedmoe_mpi.federation.loop import Loop
from pfedmoe_mpi.mpi import comm
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.model_views import Looked
from pfedmoe_mpi.run import restart
from pfedmoe_mpi.run.evaluate import evaluation_loop

MOST_SAMPLES = 1000  # test samples whose gate weights and representations are looked at
MOST_ROWS = 2000  # of the shared test set; fewer where many clients answer
LEAST_ROWS = 200
MOST_ANSWERS = 50_000  # clients × rows of the shared test set
SHOWN = 3  # representations


class LookError(UserError):
    """Models that cannot be looked into."""


def look(run: Run) -> Looked:
    """Load the run's newest good checkpoint and look into its models.

    Raises:
        UserError: no good checkpoint, no data or other ones, no MPI library.
    """
    world = comm.start(allow_singleton=True)
    if world.size > 1:
        raise LookError("a report is the work of one rank", "start it without mpirun")
    path, _, _ = restart.choose(world, run.path)
    if path is None:
        raise LookError("the run has no good checkpoint", "`restart` the run, or --models false")
    with Checkpoint(path) as loaded:
        loop = evaluation_loop(world, loaded, {"train.device": "auto"})
        if loop.federation.data_digest != loaded.identity["data_digest"]:
            raise LookError("the data changed since the checkpoint", "give the run its data back")
        own = loaded.history[-1]["clients"]["accuracy"] if loaded.history else []
    return _looked(loop, own)


def _looked(loop: Loop, own: Sequence[float | None]) -> Looked:
    made = loop.federation
    absent = made.task.absent(loop.round)
    rows = _shared_rows(loop)
    split = Split.of(made.dataset.rows(rows), made.dataset.labels[rows], made.engine.device)
    drawn = _drawn(loop)
    accuracy = np.full(made.task.clients, np.nan)
    seen: list[Seen] = []
    for number, client in made.clients.items():
        parts = made.parts(client, loop.state)
        found = measure(made.engine, made.method, parts, split, number in absent)
        if found:
            accuracy[number] = found.correct / found.samples
        if len(drawn.get(number, ())):
            seen.append(_see(loop, client, parts, drawn[number]))
    if not seen:
        raise LookError("no client that has test rows has trained yet", "wait for a later round")
    names = [name for name in seen[0].representations if all(_known(one, name) for one in seen)]
    names = names if len(names) <= SHOWN else [*names[:1], *names[-2:]]
    gated = all(one.alpha is not None for one in seen)
    labels = _labels(names, gated)
    return Looked(
        round=loop.round,
        samples=sum(len(rows) for rows in made.partition.test),
        clients=np.repeat([one.client for one in seen], [len(one.labels) for one in seen]),
        labels=np.concatenate([one.labels for one in seen]),
        alpha=np.concatenate([one.alpha for one in seen if one.alpha is not None]) if gated else None,
        raw=np.concatenate([one.raw for one in seen]),
        representations={
            label: np.concatenate([one.representations[name] for one in seen])
            for name, label in labels.items()
        },
        shared_rows=len(rows),
        shared=accuracy,
        own=np.array(own or [None] * made.task.clients, float),
        seed=seeds.address(made.config.seed, "report/embedding") % 2**32,
    )


def _known(seen: Seen, name: str) -> bool:
    return name in seen.representations and bool(np.isfinite(seen.representations[name]).all())


def _shared_rows(loop: Loop) -> np.ndarray:
    """Rows of one test set for everybody, drawn from the union of the clients' test rows, ascending."""
    made = loop.federation
    union = np.unique(np.concatenate(made.partition.test))
    most = min(MOST_ROWS, max(LEAST_ROWS, MOST_ANSWERS // made.task.clients), len(union))
    drawn = seeds.numpy_generator(made.config.seed, "report/shared").choice(union, most, replace=False)
    return np.sort(drawn)


def _drawn(loop: Loop) -> dict[int, np.ndarray]:
    """By client the places of the drawn samples in its test split; none of clients that never trained."""
    made = loop.federation
    absent = made.task.absent(loop.round)
    places = [
        (client, place)
        for client, rows in enumerate(made.partition.test)
        for place in range(len(rows))
        if client not in absent
    ]
    generator = seeds.numpy_generator(made.config.seed, "report/samples")
    chosen = np.sort(generator.choice(len(places), min(MOST_SAMPLES, len(places)), replace=False))
    table = np.array([places[n] for n in chosen]).reshape(-1, 2)
    return {int(client): table[table[:, 0] == client, 1] for client in np.unique(table[:, 0])}


@dataclass(frozen=True)
class Seen:
    """What one client's models make of some of its test samples."""

    client: int
    labels: np.ndarray
    raw: np.ndarray
    alpha: np.ndarray | None
    representations: Mapping[str, np.ndarray]


def _see(loop: Loop, client: Client, parts: Parts, places: np.ndarray) -> Seen:
    made, test = loop.federation, client.splits["test"]
    index = torch.from_numpy(places).to(test.y.device)
    split = Split(test.x[index], test.y[index])
    answer = made.method.answer(parts, partial(inputs, made.engine, test), False)
    assert answer, "a client that trained has an answer"
    alphas: list[np.ndarray] = []
    found: dict[str, list[np.ndarray]] = {}
    for module in parts.modules().values():
        module.eval()
    with torch.no_grad(), made.engine.autocast():
        for batch in batches(split, made.engine.evaluation_batch, made.engine.normalise):
            with _listening(made.method, client, parts) as heard:
                answer(batch.x)
            for name, value in heard.items():
                found.setdefault(name, []).append(value.float().cpu().numpy())
            weights = made.method.weights(parts, batch.x)
            if weights is not None:
                alphas.append(weights[:, :-1].float().sum(1).cpu().numpy())
    return Seen(
        client.id,
        split.y.cpu().numpy(),
        split.x.cpu().numpy(),
        np.concatenate(alphas) if alphas else None,
        {name: np.concatenate(values) for name, values in found.items()},
    )


@contextmanager
def _listening(method: Algorithm, client: Client, parts: Parts) -> Iterator[dict[str, torch.Tensor]]:
    """What every extractor gives, (B, d) by its part's name, and under '' what a head gets that none gave."""
    heard: dict[str, torch.Tensor] = {}

    def gave(name: str, module: Any, given: Any, result: torch.Tensor) -> None:
        heard[name] = result

    def got(module: Any, given: tuple[torch.Tensor, ...]) -> None:
        if not any(value is given[0] or torch.equal(value, given[0]) for value in heard.values()):
            heard[""] = given[0]

    handles = []
    for name, part in {**method.state(), **client.spec}.items():
        module = getattr(parts, name)
        whole = part.kind.startswith("model ")
        if whole or part.kind.startswith("extractor "):
            extractor = module.extractor if whole else module
            handles.append(extractor.register_forward_hook(partial(gave, name)))
        if whole or part.kind == "head":
            handles.append((module.head if whole else module).register_forward_pre_hook(got))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _labels(names: Sequence[str], gated: bool) -> dict[str, str]:
    """Of a gate the shared extractors' r_G, the client's own r_F and the mixture r; else the parts' names."""
    parts = [name for name in names if name]
    if gated and len(parts) > 1:
        general = dict(zip(parts[:-1], ("r_G", *(f"r_G{n}" for n in range(2, len(parts)))), strict=True))
        return {**general, parts[-1]: "r_F", **({"": "r"} if "" in names else {})}
    alone = len(names) == 1
    return {name: "r" if alone or not name else f"r of {name}" for name in names}
