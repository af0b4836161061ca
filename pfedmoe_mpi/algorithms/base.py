"""The contract of a method: a client step, a weighted mean over the cohort, a server update.

A method is one file with one subclass of `Algorithm`. If it has settings, the file also defines a class
`Options(Section)`: its fields become a configuration section and flags. A method knows nothing of MPI, HDF5
or the command line. Every hook except `predict` has a default; together the defaults are FedAvg.

    hook           runs                                    default
    state          on every rank, whenever needed          no shared parts
    client_state   on every rank, whenever needed          no private parts
    initial        on one rank, per private part           a private part begins with values of its own
    payload        on every rank, once a round             every part of the state, weighted by n_k
    cohort         on every rank, also in advance          K clients, drawn without replacement
    assemble       on one rank, before a client's turn     nothing: private parts are parts of their own
    client_step    on one rank, once per member            train `phases`, then send the state's parts
      phases       in `client_step`                        all modules together for E epochs
      loss         in `client_step`, per batch             cross-entropy of `predict`
    server_update  on rank 0, once a round                 copy the means into the state, on every rank
    predictor      on one rank, per client evaluated       `predict`, or None for a client that never trained
      predict      in `loss` and `predictor`, per batch    no default
    tune           on one rank, per unseen client          train the private modules, or all without any
    mixture        on one rank, per client evaluated       None: the method has no gate

`reserve`, `check`, `pretrain` and `prepare` run before round 1; by default they do nothing. The result of a
hook depends on its arguments, the task and the seed alone: what must last is kept in the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pfedmoe_mpi.algorithms import _cohort
from pfedmoe_mpi.algorithms._mixture import Mixture
from pfedmoe_mpi.algorithms._payload import Block, Mean
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core.parts import Module, Parts, Spec
from pfedmoe_mpi.core.parts import Tensor as TensorPart
from pfedmoe_mpi.core.sgd import Phase
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models import registry, trained
from pfedmoe_mpi.models.gate import build_gate
from pfedmoe_mpi.models.names import EMBEDDING, is_own, kind_of

if TYPE_CHECKING:
    from pfedmoe_mpi.core.batches import Batch
    from pfedmoe_mpi.core.turn import Turn

Inputs = Callable[[], Iterator[Tensor]]  # every call iterates over a client's samples again, without labels
ReadWeights = Callable[[Path, Sequence[str]], Mapping[str, Tensor]]

__all__ = [
    "Algorithm",
    "Block",
    "Inputs",
    "Mean",
    "Mixture",
    "Module",
    "Parts",
    "Phase",
    "ReadWeights",
    "Spec",
    "Task",
    "TensorPart",
]


@dataclass(frozen=True)
class Task:
    """The facts that a method may use before round 1, equal on every rank, and builders for its parts."""

    config: Config
    shape: tuple[int, ...]  # of one sample
    classes: int
    counts: np.ndarray  # int64 (N, classes), training samples by client and class
    pool: tuple[str, ...]  # architectures of the clients' own models
    shared: str  # architecture of the shared model
    dim: int  # d, length of a representation
    unseen: frozenset[int] = frozenset()  # clients that never train
    late: frozenset[int] = frozenset()  # clients that join in round `join.round`
    vocabulary: int = 0  # number of tokens if the samples are texts, else 0

    # Clients

    @property
    def clients(self) -> int:
        """N, including the unseen clients."""
        return len(self.counts)

    @cached_property
    def training(self) -> list[int]:
        """The clients that train, ascending."""
        return [client for client in range(self.clients) if client not in self.unseen]

    def absent_clients(self, round: int) -> frozenset[int]:
        """Return the clients outside of training until a round: they never train, or they join later.

        Clients that take part but were in no cohort so far are not among them.
        """
        return self.unseen | (self.late if round < self.config.join.round else frozenset())

    def samples(self, client: int) -> int:
        """Return n_k, a client's number of training samples."""
        return int(self.counts[client].sum())

    def architecture(self, client: int) -> str:
        """Return client k's architecture: number k mod len(pool) of the pool."""
        return self.pool[client % len(self.pool)]

    # Parts

    def model(self, name: str, dim: int = 0, whole: bool = False) -> Module:
        """Return an extractor with its head; `dim` replaces d; `whole`: all of it is drawn and trained."""
        sizes = (self.classes, dim or self.dim, self.config.model.stem, self.vocabulary)
        make = partial(registry.build_model, name, self.shape, *sizes)
        kind = f"model {kind_of(name)} to {dim}" if dim else f"model {kind_of(name)}"
        if whole and self.config.model.train != "all":
            kind = f"whole {kind}"
        return Module(kind, make, is_own(name)) if whole else self._selected(kind, make, name)

    def extractor(self, name: str) -> Module:
        """Return an architecture's extractor, (B, *shape) to (B, d)."""
        sizes = (self.dim, self.config.model.stem, self.vocabulary)
        make = partial(registry.build_extractor, name, self.shape, *sizes)
        return self._selected(f"extractor {kind_of(name)}", make, name)

    def _selected(self, kind: str, make: Callable[[], torch.nn.Module], name: str) -> Module:
        settings = self.config.model
        build = partial(trained.build, make, settings.train, settings.lora_rank, settings.lora_alpha)
        return Module(kind, build, is_own(name), name)

    def head(self) -> Module:
        """Return the linear head that fits every architecture, (B, d) to (B, classes)."""
        return Module("head", partial(torch.nn.Linear, self.dim, self.classes))

    def gate(self, experts: int = 2) -> Module:
        """Return a gate as `gate.*` configures it; its output is weights (B, experts).

        With `gate.input` = raw its input is what `gate_input` returns.

        Raises:
            ConfigError: gate.input = pooled, but the samples are not images.
        """
        options = self.config.gate
        if options.input == "pooled" and len(self.shape) != 3:
            problem = f"gate.input = pooled needs images; the samples have shape {self.shape}"
            raise ConfigError(problem, "use --gate.input raw")
        shape = (EMBEDDING,) if self.vocabulary else self.shape
        build = partial(build_gate, shape, self.dim, experts, **options.model_dump())
        return Module(f"gate {experts}", build, weightless=not options.module)

    def gate_input(self, x: Tensor, extractor: Any) -> Tensor:
        """Return the raw input of a gate: samples (B, *shape) unchanged, or texts (B, tokens) as (B, 64).

        Token numbers carry no meaning, so a text is represented by the embeddings in the first layer of
        `extractor`: the mean over its n tokens times √n. The gate sends no gradient into them.
        """
        if not self.vocabulary:
            return x
        embedded: Tensor = extractor.embed(x)
        return embedded.detach()

    # Weights of the mean

    def weight(self, rule: str, client: int) -> Tensor:
        """Return a client's weight under a rule of `Block`, int64 (rows,)."""
        if rule.startswith("class"):
            counts = torch.from_numpy(self.counts[client].astype(np.int64))
            return counts if rule == "class_samples" else (counts > 0).long()
        return torch.tensor([self.samples(client) if rule == "samples" else 1])

    def total_weight(self, rule: str, cohort: Sequence[tuple[int, str]]) -> int:
        """Return the cohort's weight under a rule; its members' shares of it add up to at most 1."""
        if rule.endswith("one"):
            return len(cohort)
        return sum(self.samples(client) for client, _ in cohort)


class Algorithm:
    """The base of all methods: override the hooks that differ from FedAvg."""

    homogeneous = False  # True if the method needs equal models: model.pool = auto is then model.shared
    averages_private = False  # True if the method supports unseen.private = average
    kept_by_clients: Collection[str] = ()  # the state's tensors, PART/NAME, that clients replace by their own
    bytes_once = 0  # bytes that a deployment sends every client once, before its first round
    apart: Collection[str] = ()  # private parts, which no value that is sent depends on
    beyond_gradients = ""  # how clients use samples besides the gradients of single ones; empty: not at all
    experts = 0  # number of experts that a gate weighs; 0 without a gate
    gate_start = "paper"  # what `gate.start` = auto means
    prepared_size = 0  # length of the vector that `prepare` returns; 0 if the method does not prepare

    # Set by the federation. `poll` raises StoppedError once the run must stop: call it now and then in a
    # `server_update` that takes seconds. `read_weights` returns the named float tensors of a file of weights:
    # of the first of the given parts that the file has. Only `check` and `pretrain` may call it.
    poll: Callable[[], None]
    read_weights: ReadWeights

    def __init__(self, task: Task) -> None:
        self.task = task
        self.prepared = torch.zeros(task.clients, self.prepared_size)  # by client, what `prepare` returned
        self.poll = lambda: None

    @property
    def options(self) -> Any:
        """The method's section of the configuration."""
        return self.task.config.options

    # What exists, and what is sent

    def state(self) -> Spec:
        """Return the server's parts by name.

        The cohort receives them, only `server_update` changes them, and every checkpoint contains them.
        """
        return {}

    def client_state(self, client: int) -> Spec:
        """Return a client's private parts by name, kept between rounds. They never leave the client.

        Every client has parts of the same names; the architectures may differ.
        """
        return {}

    def initial(self, part: str, client: int) -> str:
        """Return the part whose values a client's private part begins with; default: `part`, its own draw.

        It is a part of the state, taken after `pretrain`, or another private part, of the same architecture.
        """
        return part

    def payload(self, sizes: Mapping[str, int]) -> Mapping[str, Block]:
        """Return what a client sends, by name. Default: every part of the state, weighted by n_k.

        Args:
            sizes: length of each part of the state as a vector.
        """
        return {name: Block(size) for name, size in sizes.items()}

    # A round

    def cohort(self, round: int) -> list[tuple[int, str]]:
        """Return (client, role) of the clients that train in a round, ascending; called for any round.

        Default: `draw_clients` from all clients that train, each in the role "client".
        """
        return [(client, "client") for client in self.draw_clients(round, self.task.training)]

    def draw_clients(self, round: int, clients: Sequence[int], purpose: str = "cohort") -> list[int]:
        """Draw a round's share of the clients that have joined, ascending, as `_cohort.draw` says."""
        absent = self.task.absent_clients(round)
        joined = [client for client in clients if client not in absent] if absent else clients
        return _cohort.draw(self.task.config, joined, self.task.clients, round, purpose)

    def assemble(self, parts: Parts) -> None:
        """Put a client's private values into the server's parts, before it trains or is measured.

        Default: do nothing.
        """

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train `turn.parts` in place and return the payload's values; a block left out has weight 0.

        Default: SGD over `phases`, then the vectors of the state's parts. A part without numbers, such as a
        gate with gate.weights = equal, is not sent.
        """
        for phase in self.phases(turn.role):
            turn.sgd(phase)
        return {name: v for name in self.state() if (v := turn.parts.vector(name)).numel()}

    def phases(self, role: str) -> list[Phase]:
        """Return the phases of a client step, trained one after the other.

        Default: one phase with all modules, shared and private, at `train.lr` for `train.epochs` epochs.
        """
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
        """Return a phase of the configured optimiser.

        Args:
            lr: learning rate of each part that is trained; the others are frozen.
            epochs: default `train.epochs`, or as many as `train.steps` take.
            momentum: default `train.momentum`, and β1 of `train.betas` for adam and adamw.
            plain: parts trained by SGD without momentum and weight decay, whatever the optimiser.
        """
        return Phase.configured(self.task.config.train, lr, epochs, momentum, plain)

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        """Return the scalar loss of a batch. Default: cross-entropy of `predict`."""
        return torch.nn.functional.cross_entropy(self.predict(parts, batch.x), batch.y)

    def server_update(self, state: Mapping[str, Tensor], means: Mapping[str, Mean], round: int) -> None:
        """Change the state's vectors, each (size,), in place.

        Default: copy the means; a row without a contribution is unchanged. The default is exact, so every
        rank computes it. An override runs on rank 0, and the result is sent to the others.
        """
        for name, mean in means.items():
            rows = state[name].view(mean.value.shape)
            contributed = mean.weight > 0
            rows[contributed] = mean.value[contributed]

    # Evaluation

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """Return the logits (B, classes) of the client's whole model for samples (B, *shape)."""
        raise NotImplementedError

    def predictor(self, parts: Parts, inputs: Inputs, unseen: bool) -> Callable[[Tensor], Tensor] | None:
        """Return the function from samples (B, *shape) to logits (B, classes) for one evaluation.

        None means that the method has no natural answer for a client that never trained; `no_answer_reason`
        states the reason. Default: `predict`; None for an unseen client if any private part is a module.

        Args:
            inputs: each call iterates over the client's samples again, in batches, without labels.
            unseen: the client never trained; its private parts have their initial values.
        """
        return None if unseen and self.no_answer_reason else partial(self.predict, parts)

    @property
    def no_answer_reason(self) -> str:
        """The reason why clients that never trained have no accuracy; empty if they have one."""
        private = [name for name, part in self.client_state(0).items() if isinstance(part, Module)]
        return f"a client that never trained has no {' and no '.join(private)}" if private else ""

    def mixture(self, parts: Parts, inputs: Inputs) -> Callable[[Tensor], Mixture] | None:
        """Return the function from samples (B, *shape) to the mixture whose answer is that of `predictor`.

        Only for clients that trained; arguments as in `predictor`. None: the method has no gate.
        """
        return None

    def tune(self, turn: Turn, phase: Phase) -> None:
        """Adapt a client that never trains to the few training samples of `turn`, for `unseen.tune` epochs.

        Default: SGD over `phase`, of its private modules, or of all modules if it has none; nothing if
        `phases` trains none of these.
        """
        if phase.lr:
            turn.sgd(phase)

    # Before round 1

    @property
    def pretrains(self) -> bool:
        """True if the method overrides `pretrain`."""
        return type(self).pretrain is not Algorithm.pretrain

    @classmethod
    def reserve(cls, config: Config) -> float:
        """Return the share of all rows that the server keeps for `pretrain`; no client gets these rows."""
        return 0.0

    def check(self) -> None:
        """Check the files that the method reads. Called on rank 0, before a new run writes anything.

        Raises:
            UserError: a file is missing or unsuitable.
        """

    def pretrain(self, turn: Turn) -> str:
        """Fill or train the state's parts in place and return one line about the result. Called on rank 0.

        Args:
            turn: the reserved rows, split 8 : 2 into `train` and `test`, and the state's parts.

        Raises:
            UserError: ends the run on all ranks.
        """
        return ""

    def prepare(self, parts: Parts, inputs: Inputs) -> Tensor:
        """Return float32 (prepared_size,) for one client, computed from its samples and the initial state.

        The vectors of all clients are in `self.prepared` before round 1. They leave the clients once and are
        never saved.
        """
        raise NotImplementedError
