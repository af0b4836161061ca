"""The contract of a method: a client step, a weighted sum over the cohort, a server update.

A method is one file with one subclass of `Algorithm`, and optionally a class `Options(Section)` whose fields
become its configuration section and flags. Everything here has a default: FedAvg with whatever `state` and
`client_state` declare. A method knows nothing of MPI, HDF5 or the command line.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.fixedpoint import SCALE
from pfedmoe_mpi.core.parts import Module, Parts, Spec
from pfedmoe_mpi.core.parts import Tensor as TensorPart
from pfedmoe_mpi.core.sgd import Phase
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models import registry
from pfedmoe_mpi.models.gate import build_gate
from pfedmoe_mpi.models.names import EMBEDDING

if TYPE_CHECKING:
    from pfedmoe_mpi.core.batches import Batch
    from pfedmoe_mpi.core.turn import Turn

Inputs = Callable[[], Iterator[Tensor]]
ReadWeights = Callable[[Path, Sequence[str]], Mapping[str, Tensor]]

__all__ = [
    "Algorithm",
    "Block",
    "Inputs",
    "Mean",
    "Module",
    "Phase",
    "ReadWeights",
    "Spec",
    "Task",
    "TensorPart",
]


@dataclass(frozen=True)
class Block:
    """One stretch of the sum: `rows` weighted means of `size` numbers each, or a slot per cohort member.

    Weight rules: `samples` n_k (training samples), `one` 1, `class_samples` n_kc for row c (training samples
    of class c), `class_one` 1 for row c where n_kc > 0. `scale` is the number of bits after the point. A slot
    carries float32 bit patterns of (rows, size) for every cohort member, exactly: the sum is then a gather.
    """

    size: int
    rows: int = 1
    weight: Literal["samples", "one", "class_samples", "class_one"] = "samples"
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
class Task:
    """What is known to a method before round 1, the same on every rank.

    `counts` int64 (N, classes) are the clients' training samples of each class; `unseen` are the clients that
    never train, `late` those that join in round `join.round`; `vocabulary` is how many tokens there are where
    samples are texts, else 0.
    """

    config: Config
    shape: tuple[int, ...]
    classes: int
    counts: np.ndarray
    pool: tuple[str, ...]
    shared: str
    dim: int
    unseen: frozenset[int] = frozenset()
    late: frozenset[int] = frozenset()
    vocabulary: int = 0

    def absent(self, round: int) -> frozenset[int]:
        """The clients that have not trained by a round, because they never do or join later."""
        return self.unseen | (self.late if round < self.config.join.round else frozenset())

    @property
    def clients(self) -> int:
        """N, the unseen ones included."""
        return len(self.counts)

    @property
    def training(self) -> list[int]:
        """The clients that train, ascending."""
        return [client for client in range(self.clients) if client not in self.unseen]

    def samples(self, client: int) -> int:
        """n_k: training samples of a client."""
        return int(self.counts[client].sum())

    def architecture(self, client: int) -> str:
        """Client k takes number k mod length of the pool."""
        return self.pool[client % len(self.pool)]

    def model(self, name: str, dim: int = 0) -> Module:
        """Extractor and head of an architecture; `dim` gives the representation another length."""
        sizes = (self.classes, dim or self.dim, self.config.model.stem, self.vocabulary)
        build = partial(registry.build_model, name, self.shape, *sizes)
        return Module(f"model {name} to {dim}" if dim else f"model {name}", build)

    def extractor(self, name: str) -> Module:
        """The extractor alone, (B, *shape) to (B, dim)."""
        sizes = (self.dim, self.config.model.stem, self.vocabulary)
        build = partial(registry.build_extractor, name, self.shape, *sizes)
        return Module(f"extractor {name}", build)

    def head(self) -> Module:
        """The linear head of every architecture, (B, dim) to (B, classes)."""
        return Module("head", partial(torch.nn.Linear, self.dim, self.classes))

    def gate(self, experts: int = 2) -> Module:
        """A gate to weights (B, experts): on what `seen` gives of the input, or as `gate.input` says.

        Raises:
            ConfigError: pooled input of samples that are no images.
        """
        options = self.config.gate
        if options.input == "pooled" and len(self.shape) != 3:
            problem = "gate.input pooled needs images, and these samples are none"
            raise ConfigError(problem, "--gate.input raw")
        shape = (EMBEDDING,) if self.vocabulary else self.shape
        build = partial(build_gate, shape, self.dim, experts, **options.model_dump())
        return Module(f"gate {experts}", build)

    def seen(self, x: Tensor, extractor: Any) -> Tensor:
        """What a gate on the raw input sees of samples (B, *shape): these themselves.

        The numbers of words mean nothing; of texts it is the embeddings that `extractor` begins with, as one
        (B, 64): the mean of a text's n tokens times √n. The gate sends no gradient into them.
        """
        if not self.vocabulary:
            return x
        embedded: Tensor = extractor.embedded(x)
        return embedded.detach()

    def weight(self, rule: str, client: int) -> Tensor:
        """A client's weight under a rule, int64 (rows,)."""
        if rule.startswith("class"):
            held = torch.from_numpy(self.counts[client].astype(np.int64))
            return held if rule == "class_samples" else (held > 0).long()
        return torch.tensor([self.samples(client) if rule == "samples" else 1])

    def total(self, rule: str, cohort: Sequence[tuple[int, str]]) -> int:
        """The cohort's weight under a rule: its members' shares of it add up to at most 1."""
        if rule.endswith("one"):
            return len(cohort)
        return sum(self.samples(client) for client, _ in cohort)


class Algorithm:
    """Base of all methods. Override what differs."""

    homogeneous = False  # True where the method presumes equal models: model.pool = auto is then model.shared

    averages_private = False  # True where `unseen.private` average means something
    bytes_once = 0  # what a deployment sends every client once, before its first round
    prepared_size = 0  # how many numbers `prepare` gives; 0: there is nothing to prepare

    def __init__(self, task: Task) -> None:
        self.task = task
        self.prepared = torch.zeros(task.clients, self.prepared_size)  # what `prepare` gave, by client
        # Raises StoppedError if a stop was asked for: for a `server_update` of seconds to call now and then.
        self.poll: Callable[[], None] = lambda: None
        # Returns the named float tensors of a file of weights, of the first of these parts that it
        # has. Set by the federation; `check` and `pretrain` may call it.
        self.read_weights: ReadWeights

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
        return [(client, "client") for client in self.drawn(round, self.task.training)]

    def drawn(self, round: int, clients: Sequence[int], purpose: str = "cohort") -> list[int]:
        """max(1, floor(C·n + ½)) of the n clients that have joined, without replacement, ascending."""
        config, absent = self.task.config, self.task.absent(round)
        clients = [client for client in clients if client not in absent]
        if not clients:
            return []
        number = max(1, int(config.participation * len(clients) + 0.5))
        draw = seeds.numpy_generator(config.seed, purpose, round)
        return sorted(draw.choice(np.array(clients), number, replace=False).tolist())

    def phases(self, role: str) -> list[Phase]:
        """What is trained, one after the other. Default: all parts together for E epochs."""
        train = self.task.config.train
        names = {**self.state(), **self.client_state(0)}
        return [self.phase({name: train.lr for name, part in names.items() if isinstance(part, Module)})]

    def phase(
        self,
        lr: Mapping[str, float],
        epochs: int | None = None,
        momentum: float | None = None,
        plain: Collection[str] = (),
    ) -> Phase:
        """A phase with the configured optimiser."""
        train = self.task.config.train
        return Phase(
            lr,
            train.epochs if epochs is None else epochs,
            train.momentum if momentum is None else momentum,
            train.weight_decay,
            train.clip,
            frozenset(plain),
        )

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        """Scalar. Default: cross-entropy of `predict`."""
        return torch.nn.functional.cross_entropy(self.predict(parts, batch.x), batch.y)

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """Logits (B, classes) of the client's whole model."""
        raise NotImplementedError

    def answer(self, parts: Parts, inputs: Inputs, unseen: bool) -> Callable[[Tensor], Tensor] | None:
        """How a client answers, (B, *shape) to logits (B, classes), decided once per evaluation.

        Default: `predict`. None: a client that never trained has no answer that is natural to the method;
        by default one whose private parts hold a module. `unseen_null` tells the reason.

        Args:
            inputs: calls give the client's samples anew, batch by batch, without labels.
            unseen: the client never trained; its private parts are as they were initialised.
        """
        return None if unseen and self.unseen_null else partial(self.predict, parts)

    @property
    def unseen_null(self) -> str:
        """Why clients that never trained have no accuracy; empty where they have one."""
        private = [name for name, part in self.client_state(0).items() if isinstance(part, Module)]
        return f"a client that never trained has no {' and no '.join(private)}" if private else ""

    def weights(self, parts: Parts, x: Tensor) -> Tensor | None:
        """Gate weights (B, experts), shared experts first, the local one last; None without such a gate."""
        return None

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train `turn.parts` in place and return the payload's values; a block left out has weight 0.

        Default: SGD over the phases, then the vectors of the state's parts.
        """
        for phase in self.phases(turn.role):
            turn.sgd(phase)
        vectors = {name: turn.parts.vector(name) for name in self.state()}
        return {name: vector for name, vector in vectors.items() if vector.numel()}  # equal weights are none

    def server_update(self, state: Mapping[str, Tensor], means: Mapping[str, Mean], round: int) -> None:
        """Change the state's vectors in place. Default: copy the mean; a row nobody contributed stays.

        The default is exact and done by all ranks; an overriding one runs on rank 0 and its result is sent.
        """
        for name, mean in means.items():
            rows = state[name].view(mean.value.shape)
            known = mean.weight > 0
            rows[known] = mean.value[known]

    # Before round 1

    @property
    def pretrains(self) -> bool:
        """Whether there is something to do for `pretrain`."""
        return type(self).pretrain is not Algorithm.pretrain

    @classmethod
    def reserve(cls, config: Config) -> float:
        """Share of all rows that the server keeps for `pretrain`; no client gets any of them."""
        return 0.0

    def check(self) -> None:
        """Raise UserError for files that will not do; on rank 0, before anything of a new run is written."""

    def pretrain(self, turn: Turn) -> str:
        """Fill or train the state's parts in place, before round 1; runs on rank 0.

        `turn` holds the reserved rows, 8 : 2 as `train` and `test`; a UserError ends the run on all ranks.

        Returns:
            a line that says how it went.
        """
        return ""

    def prepare(self, parts: Parts, inputs: Inputs) -> Tensor:
        """(prepared_size,) float32 of a client, derived from the initial state, and never saved.

        All clients' are in `self.prepared` before round 1: they leave the clients, once.
        """
        raise NotImplementedError


def load(name: str) -> type[Algorithm]:
    """Import a method's file and return its `Algorithm`."""
    module = importlib.import_module(f"pfedmoe_mpi.algorithms.{name}")
    found = [
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Algorithm) and item.__module__ == module.__name__
    ]
    assert len(found) == 1, f"algorithms/{name}.py must define one Algorithm, not {len(found)}"
    return found[0]
