"""The value that a run is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pfedmoe_mpi.algorithms.base import Algorithm, Task
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.core.parts import Parts, Workbench
from pfedmoe_mpi.core.turn import Engine
from pfedmoe_mpi.data import Dataset, Partition
from pfedmoe_mpi.federation.stream import Stream
from pfedmoe_mpi.mpi.device import Device


@dataclass(frozen=True)
class Federation:
    """All that a run is made of; everything but `clients` and `device` is equal on every rank.

    `home` is the rank that keeps each client, `costs` the relative cost of training each for one epoch.
    """

    config: Config
    dataset: Dataset
    partition: Partition
    data_digest: str
    task: Task
    method: Algorithm
    workbench: Workbench
    engine: Engine
    device: Device
    home: Sequence[int]
    costs: Sequence[float]
    state_layout: Layout
    client_layouts: Sequence[Layout]
    clients: Mapping[int, Client]
    stream: Stream | None
    reserved: Client | None  # for methods with something to do before round 1: the rows no client has

    def parts(self, client: Client, state: torch.Tensor) -> Parts:
        """Bind a client's private vector and the server's `state` to this rank's modules."""
        return self.workbench.parts((self.method.state(), state), (client.spec, client.vector))


def pinned(vector: torch.Tensor, where: torch.device) -> torch.Tensor:
    """An idle client's vector: host memory, pinned where a GPU will read it."""
    return vector.pin_memory() if where.type == "cuda" and vector.numel() else vector


MOST_ABSENT = 5_000  # clients that never train or join late, in an attribute of a checkpoint


def samples_text(federation: Federation) -> str:
    """What a model must know of the samples it was trained on, as JSON for the checkpoint: shape (C, H, W),
    (features,) or (tokens,), classes, dtype, how many tokens there are, mean and std; who never trains or
    joins late, null if these are too many.
    """
    data, task = federation.dataset, federation.task
    absent = [sorted(task.unseen), sorted(task.late)]
    few = sum(map(len, absent)) <= MOST_ABSENT
    facts = {"shape": data.shape, "classes": data.classes, "dtype": data.dtype.name}
    facts["vocabulary"] = data.vocabulary
    return json.dumps({**facts, "mean": data.mean, "std": data.std, "absent": absent if few else None})
