"""A federation of six small clients of two classes each, for methods with experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from oracles.methods import Samples
from pfedmoe_mpi.core import seeds
from support.small_federation import TrainedFederation, build_loop, split_batches

CLASSES = ((0, 1), (2, 3), (0, 2), (1, 3), (1, 2), (0, 3))
SAMPLES = (40, 51, 36, 45, 61, 41)
SETTINGS = {"model.pool": "mlp5", "model.dim": 12, "clients": 6, "participation": 0.7, "gate.hidden": 8}


def write_six_clients(folder: Path) -> Path:
    """Write samples of two classes for each of six clients."""
    draw = np.random.default_rng(7)
    means = draw.uniform(60, 200, (4, 3, 8, 8))
    y = np.concatenate(
        [np.array(held)[draw.permutation(np.arange(n) % 2)] for held, n in zip(CLASSES, SAMPLES, strict=True)]
    )
    x = np.clip(means[y] * 0.3 + 90 + draw.normal(0, 60, (len(y), 3, 8, 8)), 0, 255).astype(np.uint8)
    path = folder / "six.h5"
    with h5py.File(path, "w") as file:
        file["x"], file["y"], file["client"] = x, y, np.repeat(np.arange(6), SAMPLES)
    return path


def write_common_expert(data: Path) -> Path:
    """Train two rounds and write the model as `export` does, for use as a common expert."""
    loop = build_loop(data, "fedavg", **SETTINGS, rounds=2)
    assert loop.run()
    layout, path = loop.federation.state_layout, data.with_name("common.h5")
    with h5py.File(path, "w") as file:
        for name, tensor in layout.views(loop.state).items():
            file[name] = tensor.numpy()
    return path


@dataclass
class SixClients(TrainedFederation):
    """A trained federation of six clients instead of three."""

    @property
    def samples(self) -> list[Samples]:
        return [self._of(k) for k in range(6)]

    def _of(self, k: int) -> Samples:
        partition, settings = self.loop.federation.partition, self.loop.federation.config
        train, test = (self._pairs(split[k]) for split in (partition.train, partition.test))
        epochs = []
        for t in range(settings.rounds):
            generator = seeds.torch_generator(settings.seed, "batches", t + 1, k)
            orders = [
                torch.randperm(len(train[1]), generator=generator) for _ in range(settings.train.epochs)
            ]
            epochs.append(
                [
                    [(train[0][r], train[1][r]) for r in split_batches(order, settings.train.batch)]
                    for order in orders
                ]
            )
        return Samples(epochs, train, test)
