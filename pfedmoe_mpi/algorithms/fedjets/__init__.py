"""FedJETs: experts of the server, chosen for each client by a gate on a common expert's embeddings.

Dun, Hipolito Garcia, Zheng, Awadallah, Sim, Kyrillidis, Dimitriadis: "FedJETs: Efficient Just-In-Time
Personalization with Federated Mixture of Experts", arXiv 2306.08586, 2023 (v3 of 2025: "Learning to
Specialize").

The server keeps experts W_1..W_M, a gate g(·; W_r) (two-layer MLP, softmax over M) and a frozen, pretrained
common expert W_c, whose embeddings x̂ of a client's samples are all that the gate sees. M clients with roughly
distinct data are anchors, anchor q tied to expert q. In a round N_a anchors and N_c other clients are active:

    client   S = argtop_K Σ_i g(x̂_i; W_r)      loss = cross-entropy(Σ_{m∈S} g_m(x̂) W_m(x), y)
    anchor   loss = cross-entropy(W_q(x), y) + cross-entropy(g(x̂; W_r), q)
    server   W_r = mean over the active clients; W_m = mean over those that trained it, else it stays

A client that never trained is answered just in time, without labels: its top K by the gate over its samples,
then for every sample the one of the K with the largest g.

Shared: a client gets and sends K experts and the gate, an anchor one expert and the gate, per round; the
common expert goes to every client once. `bytes` counts this; `mpi_bytes` is what the simulation summed.

Readings, where the text is silent: means are weighted by samples; weights are normalised over the K experts
(`renormalise`); the gate's loss of an anchor has weight 1 (`anchor_loss`); a training client is answered by
the mixture of the K experts that the gate takes over the samples to be answered.

Departures: the gate is trained by plain SGD (no momentum, no weight decay) with `train.lr_gate` (the paper:
0.001). Here nobody is given the anchors' disjoint labels: anchors are clients of the partition that overlap
least, by the label counts they then have to tell, or by k-means on the clients' mean embeddings, which tells
no label (`anchors`); these leave each client once. The common expert is trained on rows no client has, until
its accuracy on a fifth of them reaches `common_target`, or comes from a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pfedmoe_mpi.algorithms.base import Algorithm, Block, Inputs, Module, Phase, Spec, Task, TensorPart
from pfedmoe_mpi.algorithms.fedjets import common
from pfedmoe_mpi.algorithms.fedjets.anchors import by_cluster, by_label
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.models.gate import Gate


class Options(Section):
    experts: int = Field(0, ge=0)
    """Experts M; 0 = 5, or half the training clients (2 at least), if fewer."""
    top: int = Field(2, ge=1)
    """Experts K that a client gets, at most M; K = M sends all to everyone."""
    common: str = "pretrain"
    """The common expert: pretrain, or a file: HDF5 of this program, or weights that torch saved."""
    common_model: str = "auto"
    """Its architecture: auto = the experts'; a torchvision name takes torchvision's own weights."""
    common_share: float = Field(0.2, gt=0, lt=1)
    """pretrain: share of all rows that the server keeps for it."""
    common_target: float = Field(0.9, ge=0, le=1)
    """pretrain: stop at this accuracy on the fifth of the reserved rows that is not trained on."""
    common_epochs: int = Field(50, ge=1)
    """pretrain: epochs at most."""
    common_rate: float = Field(0.2, gt=0)
    """pretrain: its learning rate as a multiple of train.lr_shared."""
    anchors: Literal["labels", "clusters"] = "labels"
    """Anchors by the clients' label counts, or by clusters of their mean embeddings, without labels."""
    anchors_active: float = Field(0.5, ge=0)
    """Anchors in a round: below 1 a share of the cohort, else their number; 0 = there are no anchors."""
    anchor_loss: float = Field(1.0, ge=0)
    """Weight of an anchor's loss that teaches the gate."""
    renormalise: bool = True
    """The weights of the K experts add up to 1."""
    gate_frozen: bool = False
    """True leaves the gate as it was drawn (a control)."""


class FedJETs(Algorithm):
    homogeneous = True

    def __init__(self, task: Task) -> None:
        options: Any = task.config.options
        self._common = common.Common(task, options.common, options.common_model)
        clustered = options.anchors == "clusters" and options.anchors_active
        self.prepared_size = self._common.width if clustered else 0
        super().__init__(task)
        number = options.experts or min(5, max(2, len(task.training) // 2), len(task.training))
        if number > len(task.training) and options.anchors_active:
            raise common.too_many(number, len(task.training))
        self._names = [f"expert{m}" for m in range(number)]
        self._top = min(options.top, number)
        self._tied: tuple[Tensor, list[int]] | None = None
        self._gate = Module(f"gate of {number} experts", partial(self._build_gate, number))
        sizes = {name: part.layout().size for name, part in (("gate", self._gate), ("c", self._common.part))}
        self.bytes_once = 4 * (sizes["c"] + self.prepared_size + options.gate_frozen * sizes["gate"])

    def state(self) -> Spec:
        """W_1..W_M, W_r, W_c, and the accuracy that W_c was trained to."""
        experts = {name: self.task.model(self.task.pool[0]) for name in self._names}
        frozen: Spec = {"common": self._common.part, "common_accuracy": TensorPart((1,), math.nan)}
        return {**experts, "gate": self._gate, **frozen}

    def _build_gate(self, experts: int) -> Gate:
        width, hidden = self._common.width, self.task.config.gate.hidden
        return Gate(width, experts, hidden=hidden, input_norm="none", batch_norm=False, activation="relu")

    def payload(self, sizes: Mapping[str, int]) -> Mapping[str, Block]:
        """A block per expert, weight 0 where it was not trained, and the gate."""
        return {name: Block(sizes[name]) for name in (*self._names, *self._learned_gate)}

    @property
    def _learned_gate(self) -> list[str]:
        return [] if self.options.gate_frozen else ["gate"]

    # Before round 1

    @classmethod
    def reserve(cls, config: Config) -> float:
        options: Any = config.options
        return float(options.common_share) if options.common == common.PRETRAIN else 0.0

    def check(self) -> None:
        """The common expert's file."""
        self._common.from_file(self.read_weights)

    def pretrain(self, turn: Turn) -> str:
        """W_c from its file, or by SGD on the reserved rows until it is accurate enough."""
        found = self._common.from_file(self.read_weights)
        if found is not None:
            turn.parts.vector("common").copy_(found)
            return f"common expert: {self.options.common}"
        options = self.options
        rate = options.common_rate * self.task.config.train.lr_shared
        phase = self.phase({"common": rate}, options.common_epochs)
        return common.trained(turn, phase, options.common_target, self.task.config.train.batch)

    def prepare(self, parts: Parts, inputs: Inputs) -> Tensor:
        """The mean embedding of a client's samples (d,)."""
        embeddings = torch.cat([self._common.embed(parts, x) for x in inputs()])
        return embeddings.double().mean(0).float()

    # Who trains

    @property
    def anchors(self) -> list[int]:
        """Anchor q of every expert q; empty without anchors. By clusters it is known only after `prepare`."""
        if self._tied is None or self._tied[0] is not self.prepared:
            self._tied = self.prepared, self._choose_anchors()
        return self._tied[1]

    def _choose_anchors(self) -> list[int]:
        clients = [k for k in self.task.training if k not in self.task.late]
        clients = clients if len(clients) >= len(self._names) else self.task.training
        if not self.options.anchors_active:
            return []
        if self.options.anchors == "clusters":
            return by_cluster(self.prepared.numpy(), clients, len(self._names))
        return by_label(self.task.counts, clients, len(self._names))

    def cohort(self, round: int) -> list[tuple[int, str]]:
        """As many as by default; the anchors' share of them as asked for, and as there are."""
        config, wanted = self.task.config, self.options.anchors_active
        present = [k for k in self.task.training if k not in self.task.absent(round)]
        size = max(1, int(config.participation * len(present) + 0.5)) if present else 0
        tied = [k for k in present if k in self.anchors]
        free = [k for k in present if k not in tied]
        most = int(wanted * size + 0.5) if wanted < 1 else int(wanted)
        others = min(len(free), size - min(most, size, len(tied)))
        members = [(k, "client") for k in self._draw("cohort", round, free, others)]
        members += [(k, "anchor") for k in self._draw("anchors", round, tied, min(len(tied), size - others))]
        return sorted(members)

    def _draw(self, purpose: str, round: int, clients: Sequence[int], number: int) -> list[int]:
        draw = seeds.numpy_generator(self.task.config.seed, purpose, round)
        drawn: list[int] = draw.choice(np.array(clients, int), number, replace=False).tolist()
        return drawn

    # Training

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """K experts by the gate over all samples, or the anchor's own; with the gate, unless it is frozen."""
        parts = turn.parts
        embeddings = torch.cat([self._common.embed(parts, batch.x) for batch in turn.batches("train")])
        if turn.role == "anchor":
            chosen = [self.anchors.index(turn.client)]
            loss = partial(self._anchor_loss, parts, embeddings, chosen[0])
        else:
            chosen = self._best(parts.gate(embeddings).detach().double().sum(0))
            loss = partial(self._client_loss, parts, embeddings, chosen)
        sent = [*(self._names[m] for m in chosen), *self._learned_gate]
        turn.sgd(self._phase(sent), loss)
        values = {name: parts.vector(name) for name in sent}
        turn.bytes_down = 4 * sum(value.numel() for value in values.values())
        return values

    def _phase(self, names: Sequence[str]) -> Phase:
        """The configured SGD for experts, plain SGD for the gate."""
        train = self.task.config.train
        rates = {name: train.lr_gate if name == "gate" else train.lr_shared for name in names}
        return self.phase(rates, plain={"gate"})

    def _anchor_loss(self, parts: Parts, embeddings: Tensor, q: int, batch: Batch) -> Tensor:
        loss = F.cross_entropy(getattr(parts, self._names[q])(batch.x), batch.y)
        if self.options.gate_frozen:
            return loss
        known = parts.gate(embeddings[batch.rows])[:, q].clamp_min(torch.finfo(torch.float32).tiny)
        return loss - self.options.anchor_loss * known.log().mean()

    def _client_loss(self, parts: Parts, embeddings: Tensor, chosen: list[int], batch: Batch) -> Tensor:
        return F.cross_entropy(self._mixture(parts, batch.x, embeddings[batch.rows], chosen), batch.y)

    def _best(self, scores: Tensor) -> list[int]:
        """The top K of scores (M,), ascending; of equal ones the first."""
        return sorted(scores.argsort(descending=True, stable=True)[: self._top].tolist())

    def _outputs(self, parts: Parts, x: Tensor, chosen: list[int]) -> Tensor:
        """Logits of some experts, (B, K, classes)."""
        return torch.stack([getattr(parts, self._names[m])(x).float() for m in chosen], 1)

    def _mixture(self, parts: Parts, x: Tensor, embeddings: Tensor, chosen: list[int]) -> Tensor:
        """Σ_m g_m(x̂) W_m(x), (B, classes)."""
        weights = parts.gate(embeddings)[:, chosen]
        if self.options.renormalise:
            weights = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        mixed: Tensor = (weights.unsqueeze(2) * self._outputs(parts, x, chosen)).sum(1)
        return mixed

    # Answering

    def answer(self, parts: Parts, inputs: Inputs, unseen: bool) -> Callable[[Tensor], Tensor]:
        """The top K by the gate over the samples: their mixture; for unseen clients the best per sample."""
        scores = torch.zeros(len(self._names), dtype=torch.float64, device=parts.vector("gate").device)
        for x in inputs():
            scores += parts.gate(self._common.embed(parts, x)).double().sum(0)
        chosen = self._best(scores)

        def mixed(x: Tensor) -> Tensor:
            return self._mixture(parts, x, self._common.embed(parts, x), chosen)

        def routed(x: Tensor) -> Tensor:
            best = parts.gate(self._common.embed(parts, x))[:, chosen].argmax(1)
            return self._outputs(parts, x, chosen)[torch.arange(len(x), device=x.device), best]

        return routed if unseen else mixed

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """The mixture of the K experts that the gate takes over these samples."""
        return self.answer(parts, lambda: iter([x]), unseen=False)(x)
