"""Evaluation of a run's models for its report: gate weights, representations, one shared test set.

Uses the newest good checkpoint and the run's data, in this one process. The only module of reports that needs
torch and MPI; the constants below bound its cost.
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
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.batches import Split, batches
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.errors import UserError
from pfedmoe_mpi.federation.evaluation import inputs, measure
from pfedmoe_mpi.federation.loop import Loop
from pfedmoe_mpi.mpi import launch
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.model_views import ModelViews
from pfedmoe_mpi.run import restart
from pfedmoe_mpi.run.evaluate import evaluation_loop

MOST_SAMPLES = 1000  # test samples whose gate weights and representations are computed
MOST_ROWS = 2000  # of the shared test set; fewer with many clients
LEAST_ROWS = 200
MOST_ANSWERS = 50_000  # clients × rows of the shared test set
MOST_REPRESENTATIONS = 3


class ProbeError(UserError):
    """Models that cannot be evaluated for a report."""


def view_models(run: Run) -> ModelViews:
    """Load the run's newest good checkpoint and evaluate its models.

    Raises:
        UserError: there is no good checkpoint, the data are missing or changed, or there is no MPI library.
    """
    world = launch.start(allow_singleton=True)
    if world.size > 1:
        raise ProbeError("report runs on one rank", "start it without mpirun")
    found, _, _ = restart.choose(world, run.path)
    if found is None:
        raise ProbeError(
            "the run has no good checkpoint", f"pfedmoe-mpi restart {run.path}, or report with --models false"
        )
    with found as loaded:
        loop = evaluation_loop(world, loaded, {"train.device": "auto"}, protected=False)
        if loop.federation.data_digest != loaded.identity["data_digest"]:
            raise ProbeError(
                "the data have changed since the checkpoint", "restore the run's data, or --models false"
            )
        accuracy_own = loaded.history[-1]["clients"]["accuracy"] if loaded.history else []
    return _views(loop, accuracy_own)


def _views(loop: Loop, accuracy_own: Sequence[float | None]) -> ModelViews:
    """Evaluate every client on the shared test set, and on its share of the sampled test samples."""
    federation = loop.federation
    clients = federation.task.clients
    absent = federation.task.absent_clients(loop.round)
    rows = _shared_rows(loop)
    shared_test = Split.of(
        federation.dataset.rows(rows), federation.dataset.labels[rows], federation.engine.device
    )
    samples = _sample_positions(loop)
    accuracy_shared = np.full(clients, np.nan)
    views: list[ClientView] = []
    for number, client in federation.clients.items():
        parts = federation.parts(client, loop.state)
        measured = measure(federation.engine, federation.method, parts, shared_test, number in absent)
        if measured:
            accuracy_shared[number] = measured.correct / measured.samples
        if len(samples.get(number, ())):
            views.append(_client_view(loop, client, parts, samples[number]))
    if not views:
        raise ProbeError("no client with test samples has trained yet", "report again after a later round")
    gated = all(view.alpha is not None for view in views)
    names = _drawn_names(views)
    labels = _labels(names, gated)
    own = federation.clients[views[0].client].spec
    return ModelViews(
        round=loop.round,
        samples=sum(len(rows) for rows in federation.partition.test),
        clients=np.repeat([view.client for view in views], [len(view.labels) for view in views]),
        labels=np.concatenate([view.labels for view in views]),
        alpha=np.concatenate([view.alpha for view in views if view.alpha is not None]) if gated else None,
        raw=np.concatenate([view.raw for view in views]),
        representations={
            label: np.concatenate([view.representations[name] for view in views])
            for name, label in labels.items()
        },
        private=frozenset(label for name, label in labels.items() if _is_private(name, views[0], own)),
        shared_rows=len(rows),
        accuracy_shared=accuracy_shared,
        accuracy_own=np.array(accuracy_own or [None] * clients, float),
        seed=seeds.address(federation.config.seed, "report/embedding") % 2**32,
    )


def _shared_rows(loop: Loop) -> np.ndarray:
    """Draw the rows of the shared test set from the union of the clients' test rows; ascending."""
    federation = loop.federation
    union = np.unique(np.concatenate(federation.partition.test))
    size = min(MOST_ROWS, max(LEAST_ROWS, MOST_ANSWERS // federation.task.clients), len(union))
    generator = seeds.numpy_generator(federation.config.seed, "report/shared")
    return np.sort(generator.choice(union, size, replace=False))


def _sample_positions(loop: Loop) -> dict[int, np.ndarray]:
    """Draw test samples of the clients that have trained; positions in the test split, by client."""
    federation = loop.federation
    absent = federation.task.absent_clients(loop.round)
    positions = [
        (client, position)
        for client, rows in enumerate(federation.partition.test)
        for position in range(len(rows))
        if client not in absent
    ]
    generator = seeds.numpy_generator(federation.config.seed, "report/samples")
    chosen = np.sort(generator.choice(len(positions), min(MOST_SAMPLES, len(positions)), replace=False))
    table = np.array([positions[n] for n in chosen]).reshape(-1, 2)
    return {int(client): table[table[:, 0] == client, 1] for client in np.unique(table[:, 0])}


@dataclass(frozen=True)
class ClientView:
    """Outputs of one client's models on n of its test samples; see `ModelViews`."""

    client: int
    labels: np.ndarray
    raw: np.ndarray
    alpha: np.ndarray | None
    representations: Mapping[str, np.ndarray]


def _client_view(loop: Loop, client: Client, parts: Parts, positions: np.ndarray) -> ClientView:
    federation, test = loop.federation, client.splits["test"]
    index = torch.from_numpy(positions).to(test.y.device)
    split = test.rows(index)
    samples = partial(inputs, federation.engine, test)
    answer = federation.method.predictor(parts, samples, False)
    mixture = federation.method.mixture(parts, samples)
    assert answer, "a client that trained has an answer"
    alphas: list[np.ndarray] = []
    outputs: dict[str, list[np.ndarray]] = {}
    for module in parts.modules().values():
        module.eval()
    with torch.no_grad(), federation.engine.autocast():
        for batch in batches(split, federation.engine.evaluation_batch, federation.engine.normalise):
            with _recorded(federation.method, client, parts) as recorded:
                answer(batch.x)
            for name, value in recorded.items():
                outputs.setdefault(name, []).append(value.float().cpu().numpy())
            shared = mixture(batch.x).shared if mixture else None
            if shared is not None:
                alphas.append(shared.float().sum(1).cpu().numpy())
    return ClientView(
        client.id,
        split.y.cpu().numpy(),
        split.x.cpu().numpy(),
        np.concatenate(alphas) if alphas else None,
        {name: np.concatenate(values) for name, values in outputs.items()},
    )


@contextmanager
def _recorded(method: Algorithm, client: Client, parts: Parts) -> Iterator[dict[str, torch.Tensor]]:
    """Record every extractor's output, (B, d), by its part's name.

    Under '': the input of a head, if it is the output of none of the extractors.
    """
    recorded: dict[str, torch.Tensor] = {}

    def record_output(name: str, module: Any, inputs: Any, output: torch.Tensor) -> None:
        recorded[name] = output

    def record_input(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if not any(value is inputs[0] or torch.equal(value, inputs[0]) for value in recorded.values()):
            recorded[""] = inputs[0]

    handles = []
    for name, part in {**method.state(), **client.spec}.items():
        module = getattr(parts, name)
        whole_model = part.kind.startswith("model ")
        if whole_model or part.kind.startswith("extractor "):
            extractor = module.extractor if whole_model else module
            handles.append(extractor.register_forward_hook(partial(record_output, name)))
        if whole_model or part.kind == "head":
            head = module.head if whole_model else module
            handles.append(head.register_forward_pre_hook(record_input))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _drawn_names(views: Sequence[ClientView]) -> list[str]:
    """Return the parts whose representations are drawn; of more than three, the first and the last two."""
    names = [name for name in views[0].representations if all(_is_finite(view, name) for view in views)]
    return names if len(names) <= MOST_REPRESENTATIONS else [*names[:1], *names[-2:]]


def _is_private(name: str, view: ClientView, own: Mapping[str, Any]) -> bool:
    """Return whether a representation involves a part of the client's `own`; a head's input involves all."""
    return name in own if name else any(part in own for part in view.representations)


def _is_finite(view: ClientView, name: str) -> bool:
    return name in view.representations and bool(np.isfinite(view.representations[name]).all())


def _labels(names: Sequence[str], gated: bool) -> dict[str, str]:
    """Label representations by part name.

    With a gate: r_G of the shared extractors, r_F of the client's own, r of the mixture. Without: the names
    of the parts.
    """
    parts = [name for name in names if name]
    if gated and len(parts) > 1:
        shared = dict(zip(parts[:-1], ("r_G", *(f"r_G{n}" for n in range(2, len(parts)))), strict=True))
        return {**shared, parts[-1]: "r_F", **({"": "r"} if "" in names else {})}
    alone = len(names) == 1
    return {name: "r" if alone or not name else f"r of {name}" for name in names}
