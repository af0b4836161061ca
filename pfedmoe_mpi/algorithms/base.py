"""The contract of a method: a client step, a weighted sum over the cohort, a server update.

A method is one file with one subclass of `Algorithm`, and optionally a class `Options(Section)` whose fields
become its configuration section and flags. Everything here has a default: FedAvg with whatever `state` and
`client_state` declare. A method knows nothing of MPI, HDF5 or the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from pfedmoe_mpi import seeds
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.fixedpoint import SCALE
from pfedmoe_mpi.models import registry
from pfedmoe_mpi.models.gate import Gate
from pfedmoe_mpi.parts import Module, Parts, Spec
from pfedmoe_mpi.parts import Tensor as TensorPart

if TYPE_CHECKING:
    from pfedmoe_mpi.data.shard import Batch
    from pfedmoe_mpi.training import Turn

__all__ = ["Algorithm", "Block", "Mean", "Module", "Phase", "Spec", "Task", "TensorPart"]


@dataclass(frozen=True)
class Block:
    """One stretch of the sum: `rows` weighted means of `size` numbers each, or a slot per cohort member.

    Weight rules: `samples` n_k (training samples), `one` 1, `class_samples` n_kc for row c (training samples
    of class c). `scale` is the number of bits after the point. A slot carries float32 bit patterns of
    (rows, size) for every cohort member, exactly: the sum is then a gather.
    """

    size: int
    rows: int = 1
    weight: Literal["samples", "one", "class_samples"] = "samples"
    scale: int = SCALE
    slot: bool = False


@dataclass(frozen=True)
class Mean:
    """What the sum of a block gives: value float32 (rows, size) on the CPU, weight int64 (rows,).

    Rows of zero weight are NaN. For a slot block value is (members, rows, size) and weight (members, rows).
    """

    value: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Phase:
    """SGD over some parts: learning rate by part name. Parts not named are frozen, in evaluation mode."""

    lr: Mapping[str, float]
    epochs: int
    momentum: float
    weight_decay: float
    clip: float


@dataclass(frozen=True)
class Task:
    """What is known to a method before round 1, the same on every rank.

    `counts` int64 (N, classes) are the clients' training samples of each class.
    """

    config: Config
    shape: tuple[int, ...]
    classes: int
    counts: np.ndarray
    pool: tuple[str, ...]
    shared: str
    dim: int

    @property
    def clients(self) -> int:
        return len(self.counts)

    def samples(self, client: int) -> int:
        """n_k: training samples of a client."""
        return int(self.counts[client].sum())

    def architecture(self, client: int) -> str:
        """Client k takes number k mod length of the pool."""
        return self.pool[client % len(self.pool)]

    def model(self, name: str) -> Module:
        """Extractor and head of an architecture."""
        stem = self.config.model.stem
        build = partial(registry.build_model, name, self.shape, self.classes, self.dim, stem)
        return Module(f"model {name}", build)

    def extractor(self, name: str) -> Module:
        """The extractor alone, (B, *shape) to (B, dim)."""
        build = partial(registry.build_extractor, name, self.shape, self.dim, self.config.model.stem)
        return Module(f"extractor {name}", build)

    def gate(self, experts: int = 2) -> Module:
        """A gate on the raw input, (B, *shape) to (B, experts)."""
        options = self.config.gate.model_dump()
        build = partial(Gate, int(np.prod(self.shape)), experts, **options)
        return Module(f"gate {experts}", build)

    def weight(self, rule: str, client: int) -> Tensor:
        """A client's weight under a rule, int64 (rows,)."""
        if rule == "class_samples":
            return torch.from_numpy(self.counts[client].astype(np.int64))
        return torch.tensor([self.samples(client) if rule == "samples" else 1])

    def total(self, rule: str, cohort: Sequence[tuple[int, str]]) -> int:
        """The cohort's weight under a rule: its members' shares of it add up to at most 1."""
        return len(cohort) if rule == "one" else sum(self.samples(client) for client, _ in cohort)


class Algorithm:
    """Base of all methods. Override what differs."""

    homogeneous = False  # True where the method presumes equal models: model.pool = auto is then model.shared

    def __init__(self, task: Task) -> None:
        self.task = task

    @property
    def options(self) -> Any:
        """The method's section of the configuration."""
        return self.task.config.options

    def state(self) -> Spec:
        """The server's parts: sent to the cohort, changed only by `server_update`, in every checkpoint."""
        return {}

    def client_state(self, client: int) -> Spec:
        """A client's private parts, kept between rounds; they never leave it. Architectures may differ."""
        return {}

    def payload(self, sizes: Mapping[str, int]) -> Mapping[str, Block]:
        """What a client sends; `sizes` are the lengths of the state's vectors. Default: these, weight n_k."""
        return {name: Block(size) for name, size in sizes.items()}

    def cohort(self, round: int) -> list[tuple[int, str]]:
        """(client, role) of those who train in a round, ascending. Default: K drawn without replacement."""
        task = self.task
        draw = seeds.numpy_generator(task.config.seed, "cohort", round)
        chosen = draw.choice(task.clients, task.config.cohort_size, replace=False)
        return [(int(client), "client") for client in np.sort(chosen)]

    def phases(self, role: str) -> list[Phase]:
        """What is trained, one after the other. Default: all parts together for E epochs."""
        train = self.task.config.train
        names = {**self.state(), **self.client_state(0)}
        return [self.phase({name: train.lr for name, part in names.items() if isinstance(part, Module)})]

    def phase(
        self, lr: Mapping[str, float], epochs: int | None = None, momentum: float | None = None
    ) -> Phase:
        """A phase with the configured optimiser."""
        train = self.task.config.train
        return Phase(
            lr,
            train.epochs if epochs is None else epochs,
            train.momentum if momentum is None else momentum,
            train.weight_decay,
            train.clip,
        )

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        """Scalar. Default: cross-entropy of `predict`."""
        return torch.nn.functional.cross_entropy(self.predict(parts, batch.x), batch.y)

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """Logits (B, classes) of the client's whole model."""
        raise NotImplementedError

    def weights(self, parts: Parts, x: Tensor) -> Tensor | None:
        """Gate weights (B, experts), column 0 the shared expert; None where there is no gate."""
        return None

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train `turn.parts` in place and return the payload's values; a block left out has weight 0.

        Default: SGD over the phases, then the vectors of the state's parts.
        """
        for phase in self.phases(turn.role):
            turn.sgd(phase)
        return {name: turn.parts.vector(name) for name in self.state()}

    def server_update(self, state: Mapping[str, Tensor], means: Mapping[str, Mean]) -> None:
        """Change the state's vectors in place. Default: copy the mean; a row nobody contributed stays.

        The default is exact and done by all ranks; an overriding one runs on rank 0 and its result is sent.
        """
        for name, mean in means.items():
            rows = state[name].view(mean.value.shape)
            known = mean.weight > 0
            rows[known] = mean.value[known]
