"""A federation of three small clients, trained by the program, and what a reference round needs from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from oracles.methods import Course, Samples
from pfedmoe_mpi import config
from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.federation import disk
from pfedmoe_mpi.federation.build import build as build_federation
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.mpi import launch
from pfedmoe_mpi.run import console

SETTINGS: dict[str, Any] = {
    "data.source": "hdf5",
    "data.mean": "0.4,0.5,0.6",
    "data.std": "0.2,0.25,0.3",
    "partition.kind": "natural",
    "clients": 3,
    "participation": 0.67,
    "rounds": 3,
    "train.batch": 16,
    "train.epochs": 2,
    "train.lr": 0.03,
    "train.lr_shared": 0.02,
    "train.lr_gate": 0.05,
    "train.threads": 1,
    "train.device": "cpu",
    "gate.hidden": 8,
    "model.dim": 12,
}
CLASSES = (
    (0, 1),
    (1, 2),
    (2, 3),
)  # classes of each client; client 0 alone has class 0, client 2 alone class 3
SAMPLES = (50, 61, 41)
TRAINING_SAMPLES = (40, 49, 33)  # of them; 49 and 33 leave a last batch of one, which joins the one before it

shared_comm = cache(launch.start)


def write_data(path: Path, side: int, spoilt: int | None = None) -> Path:
    """Write samples of three clients with separable classes; client `spoilt` has values near 1e30."""
    draw = np.random.default_rng(5)
    means = draw.uniform(60, 200, (4, 3, side, side))
    y = np.concatenate([draw.permutation(np.arange(n) % 2 + k) for k, n in enumerate(SAMPLES)])
    assert all(set(y[client_rows(k)]) == set(CLASSES[k]) for k in range(3))
    x = np.clip(means[y] * 0.12 + 110 + draw.normal(0, 60, (len(y), 3, side, side)), 0, 255).astype(np.uint8)
    if spoilt is not None:
        x = x.astype(np.float32) / 255
        x[client_rows(spoilt)] *= 1e30
    with h5py.File(path, "w") as file:
        file["x"], file["y"], file["client"] = x, y, np.repeat(np.arange(3), SAMPLES)
    return path


def client_rows(k: int) -> slice:
    return slice(sum(SAMPLES[:k]), sum(SAMPLES[: k + 1]))


def write_data_files(folder: Path) -> dict[str, Path]:
    """Write all data files and return {name: path}."""
    return {
        "small": write_data(folder / "small.h5", 8),
        "images": write_data(folder / "images.h5", 16),
        "spoilt": write_data(folder / "spoilt.h5", 8, spoilt=1),
    }


@dataclass
class TrainedFederation:
    """A trained federation, and the vectors it started from."""

    loop: Loop
    state: Tensor
    private: dict[int, Tensor]

    def of_state(self, part: str, start: bool = True) -> dict[str, Tensor]:
        """Return a part of the server's vector by tensor name, before round 1 or now."""
        layout = self.loop.federation.state_layout
        return named_part(layout.views(self.state if start else self.loop.state), part)

    def of_client(self, k: int, part: str, start: bool = True) -> dict[str, Tensor]:
        """Return a part of a client's vector by tensor name, before round 1 or now."""
        layout = self.loop.federation.client_layouts[k]
        return named_part(
            layout.views(self.private[k] if start else self.loop.federation.clients[k].vector), part
        )

    @property
    def cohorts(self) -> list[list[int]]:
        """The clients that trained in each round and were not left out."""
        return [[k for k in row["cohort"] if k not in row["dropped"]] for row in self.loop.history]

    @property
    def course(self) -> Course:
        """The samples, cohorts and optimiser settings for the reference."""
        settings = self.loop.federation.config
        train, rounds = settings.train, settings.rounds
        cosine = [0.5 * (1 + np.cos(np.pi * t / rounds)) for t in range(rounds)]
        return Course(
            samples=self.samples,
            cohorts=self.cohorts,
            rates=cosine if train.schedule == "cosine" else [1.0] * rounds,
            lr=train.lr,
            lr_shared=train.lr_shared,
            lr_gate=train.lr_gate,
            momentum=train.momentum,
            weight_decay=train.weight_decay,
            clip=train.clip,
        )

    @property
    def samples(self) -> list[Samples]:
        """Every client's batches, drawn again from their random addresses."""
        return [self._samples(k) for k in range(len(SAMPLES))]

    def _samples(self, k: int) -> Samples:
        federation = self.loop.federation
        train, test = (
            self._pairs(split[k]) for split in (federation.partition.train, federation.partition.test)
        )
        assert len(train[1]) == TRAINING_SAMPLES[k]
        epochs = []
        for t in range(federation.config.rounds):
            generator = seeds.torch_generator(federation.config.seed, "batches", t + 1, k)
            shuffles = [
                torch.randperm(TRAINING_SAMPLES[k], generator=generator)
                for _ in range(federation.config.train.epochs)
            ]
            epochs.append(
                [
                    [
                        (train[0][rows], train[1][rows])
                        for rows in split_batches(order, federation.config.train.batch)
                    ]
                    for order in shuffles
                ]
            )
        return Samples(epochs, train, test)

    def _pairs(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return samples as a model sees them: from bytes to [0, 1], minus mean, over standard deviation."""
        dataset = self.loop.federation.dataset
        x = torch.from_numpy(dataset.rows(rows))
        if x.dtype == torch.uint8:
            x = x.float() / 255
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (dataset.mean, dataset.std))
        return (x - mean) / std, torch.from_numpy(dataset.labels[rows])


def named_part(views: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(part + "/"): t for name, t in views.items() if name.startswith(part + "/")}


def split_batches(order: Tensor, size: int) -> list[Tensor]:
    """Return an epoch's batches; a last batch of one sample joins the one before it."""
    pieces = list(order.split(size))
    return [*pieces[:-2], torch.cat(pieces[-2:])] if len(pieces[-1]) == 1 else pieces


def build_loop(path: Path, method: str, **changes: Any) -> Loop:
    """Build a federation before its first round; `__` in a setting's name stands for the dot."""
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    chosen = config.build({**SETTINGS, "data.path": str(path), "algorithm": method, **dotted})
    return Loop(shared_comm(), build_federation(shared_comm(), chosen), SilentObserver(), None)


def train_federation(path: Path, method: str, **changes: Any) -> TrainedFederation:
    loop = build_loop(path, method, **changes)
    start = {k: client.vector.clone() for k, client in loop.federation.clients.items()}
    result = TrainedFederation(loop, loop.state.clone(), start)
    assert loop.run()
    return result


def first_batch(loop: Loop, k: int = 0) -> tuple[Algorithm, Parts, Batch]:
    """Return the method, a client's parts and its first batch."""
    federation = loop.federation
    client, method = federation.clients[k], federation.method
    parts = federation.workbench.parts((method.state(), loop.state), (client.spec, client.vector))
    split = client.splits["train"]
    rows = torch.arange(16)
    return method, parts, Batch(federation.engine.normalise(split.x[:16]), split.y[:16], rows)


def weights_of(method: Algorithm, parts: Parts, x: Tensor) -> Tensor:
    """Return the gate's weights (B, experts) of normalised samples."""
    mixture = method.mixture(parts, lambda: iter([x]))
    assert mixture
    return mixture(x).weights


def loss_gradients(loop: Loop) -> dict[str, float]:
    """Return the largest gradient of the loss by tensor, 0 where there is none."""
    method, parts, batch = first_batch(loop)
    for module in parts.modules().values():
        module.train()
        module.requires_grad_(True)
        module.zero_grad(set_to_none=True)
    method.loss(parts, batch).backward()
    return {
        f"{part}/{name}": 0.0 if p.grad is None else float(p.grad.abs().max())
        for part, module in parts.modules().items()
        for name, p in module.named_parameters()
    }


def longer(it: TrainedFederation, epochs: int) -> Course:
    """Return the course with another number of epochs per round."""
    config, course = it.loop.federation.config, it.course
    samples = []
    for k, own in enumerate(course.samples):
        x, y = own.train
        rounds = []
        for t in range(config.rounds):
            draw = seeds.torch_generator(config.seed, "batches", t + 1, k)
            orders = [torch.randperm(TRAINING_SAMPLES[k], generator=draw) for _ in range(epochs)]
            rounds.append(
                [[(x[i], y[i]) for i in split_batches(order, config.train.batch)] for order in orders]
            )
        samples.append(replace(own, epochs=rounds))
    return replace(course, samples=samples)


def plan_of(federation: Federation) -> list[str]:
    """Return the plan's lines of one rank on the CPU, with a run folder that does not exist."""
    return console.plan(federation, ["cpu"], [disk.scratch_of(federation, "here")], Path("run"))
