"""A federation: everything that a run is made of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pfedmoe_mpi.algorithms.base import Algorithm, Task
from pfedmoe_mpi.checkpoint.frozen import Frozen
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core.batches import Split
from pfedmoe_mpi.core.beginning import Beginning
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.core.parts import Parts, Spec, Workbench
from pfedmoe_mpi.core.staging import Staging
from pfedmoe_mpi.core.turn import Engine
from pfedmoe_mpi.data import Dataset, Partition
from pfedmoe_mpi.federation.distribute import Shards
from pfedmoe_mpi.federation.pretrained import Pretrained
from pfedmoe_mpi.federation.store import Store
from pfedmoe_mpi.federation.stream import Stream
from pfedmoe_mpi.mpi.device import Device

if TYPE_CHECKING:
    from pfedmoe_mpi.federation.client_privacy import ClientPrivacy


class Clients(Mapping[int, Client]):
    """A rank's clients by number; each is put together, with its vector, when it is asked for."""

    def __init__(self, shards: Shards, specs: Sequence[Spec], store: Store, keep: bool) -> None:
        """Take a rank's clients.

        Args:
            keep: a client's splits are the same objects each time, because outputs are kept for them.
        """
        self._splits = shards
        self._specs = specs
        self._store = store
        self._kept: dict[int, dict[str, Split]] | None = {} if keep else None

    def __getitem__(self, client: int) -> Client:
        splits = self._splits[client]
        if self._kept is not None:
            splits = self._kept.setdefault(client, splits)
        return Client(client, self._specs[client], self._store.get(client), splits)

    def __contains__(self, client: object) -> bool:
        return client in self._splits

    def __iter__(self) -> Iterator[int]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)

    def in_store_order(self, clients: Iterable[int]) -> Iterator[Client]:
        """Yield clients, those in the store's scratch file last, which it reads ahead."""
        return (self[client] for client in self._store.walk(clients))


@dataclass(frozen=True)
class Federation:
    """Everything that a run is made of; equal on every rank.

    Not equal are `clients`, `store`, `staging`, `streamed` and `device`.

    `home` is the rank that keeps each client, `costs` the relative cost of training each for one epoch,
    `code` the text of the user's own files by name. `specs` and `client_layouts` hold one object for each
    kind of client.
    """

    config: Config
    code: Mapping[str, str]
    dataset: Dataset
    partition: Partition
    data_digest: str
    task: Task
    method: Algorithm
    pretrained: Pretrained
    frozen: Frozen
    workbench: Workbench
    engine: Engine
    device: Device
    home: Sequence[int]
    costs: Sequence[float]
    state_layout: Layout
    specs: Sequence[Spec]
    client_layouts: Sequence[Layout]
    clients: Clients  # those of this rank
    beginning: Beginning
    store: Store  # of this rank
    staging: Staging
    streamed: bool  # whether this rank's samples stay in host memory
    stream: Stream | None
    reserved: Client | None  # the rows of no client, for methods that train before round 1
    private: ClientPrivacy | None = None  # clipping and noise of whole clients
    gate_rows: Split | None = None  # test rows that all gates weigh; None for a method without a gate

    def parts(self, client: Client, state: torch.Tensor) -> Parts:
        """Bind a client's private vector and the server's `state` to this rank's modules."""
        with self.staging.staged(client.vector) as vector:
            parts = self.workbench.parts((self.method.state(), state), (client.spec, vector))
            self.method.assemble(parts)
            return parts


def pin(vector: torch.Tensor, where: torch.device) -> torch.Tensor:
    """Return a vector in host memory, pinned if a GPU will read it."""
    return vector.pin_memory() if where.type == "cuda" and vector.numel() else vector


LONGEST_NAMES = 100_000  # characters of all class names together, in an attribute and in a line of events


def named_classes(federation: Federation) -> tuple[str, ...]:
    """Return the names of the classes; empty if they are the classes' numbers, or if they are too long."""
    names = federation.dataset.class_names
    numbers = names == tuple(map(str, range(len(names))))
    return () if numbers or sum(map(len, names)) > LONGEST_NAMES else names


MOST_ABSENT = 5_000  # clients that never train or join late, listed in an attribute of a checkpoint


def samples_text(federation: Federation) -> str:
    """Return, as JSON for the checkpoint, what a model needs to know of the samples it was trained on.

    shape (C, H, W), (features,) or (tokens,); classes; dtype; vocabulary, the number of tokens; mean and std;
    absent, the clients that never train and those that join late, null if these are too many; class_names,
    as `named_classes` returns them.
    """
    data, task = federation.dataset, federation.task
    absent = [sorted(task.unseen), sorted(task.late)]
    listed = sum(map(len, absent)) <= MOST_ABSENT
    facts = {"shape": data.shape, "classes": data.classes, "dtype": data.dtype.name}
    facts |= {"vocabulary": data.vocabulary, "class_names": named_classes(federation)}
    return json.dumps({**facts, "mean": data.mean, "std": data.std, "absent": absent if listed else None})
