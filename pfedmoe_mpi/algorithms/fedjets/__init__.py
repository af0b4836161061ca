"""FedJETs (later DDOME): experts, chosen for each client by a gate on a common expert's embeddings.

Dun, Hipolito Garcia, Zheng, Awadallah, Sim, Kyrillidis, Dimitriadis: "FedJETs: Efficient Just-In-Time
Personalization with Federated Mixture of Experts", arXiv 2306.08586, 2023; v3 of 2025, in which the method is
called DDOME: "Learning to Specialize: Joint Gating-Expert Training for Adaptive MoEs in Decentralized
Settings".

The server keeps experts W_1..W_M, a gate g(·; W_r) (two-layer MLP, softmax over M) and a frozen, pretrained
common expert W_c. The gate's only input is W_c's embeddings x̂ of a client's samples. M clients with roughly
distinct data are anchors; anchor q is tied to expert q. In a round N_a anchors and N_c other clients are
active:

    client   S = argtop_K Σ_i g(x̂_i; W_r)      loss = cross-entropy(Σ_{m∈S} g_m(x̂) W_m(x), y)
    anchor   loss = cross-entropy(W_q(x), y) + cross-entropy(g(x̂; W_r), q)
    server   W_r = mean over the active clients; W_m = mean over those that trained it, else unchanged

A client that never trained is answered just in time, without labels: the gate selects its top K experts over
all its samples, then for every sample the one of the K with the largest g.

Shared: in a round a client receives and sends K experts and the gate, an anchor one expert and the gate;
every client receives the common expert once. `bytes` counts this; `mpi_bytes` is what the simulation summed.

Our readings where the paper is silent: means are weighted by samples; weights are normalised over the K
experts (`renormalise`); an anchor's gate loss has weight 1 (`anchor_loss`); a training client answers with
the mixture of the K experts that the gate selects over the samples to be answered.

Departures: whatever `train.optimiser`, the gate is trained by plain SGD (no momentum, no weight decay) with
`train.lr_gate` (the paper: 0.001). The paper's anchors are given disjoint labels. Here anchors are the
clients of the partition that overlap least, by their label counts, which they must reveal, or by k-means on
their mean embeddings, which reveals no label (`anchors`); counts or embeddings leave each client once. The
common expert is trained on rows that no client has, until its accuracy on a fifth of them reaches
`common_target`, or it is read from a file.
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

from pfedmoe_mpi.algorithms.base import (
    Algorithm,
    Block,
    Inputs,
    Mixture,
    Module,
    Phase,
    Spec,
    Task,
    TensorPart,
)
from pfedmoe_mpi.algorithms.fedjets import common
from pfedmoe_mpi.algorithms.fedjets.anchors import by_cluster, by_label
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models.gate import Gate


class Options(Section):
    experts: int = Field(0, ge=0)
    """Number of experts M; 0 chooses it. Default: 0 = 5, as in the paper on CIFAR-10, or half the training
    clients (at least 2) if that is fewer, because few clients cannot spare five anchors."""
    top: int = Field(2, ge=1)
    """Number of experts K that a client receives, at most M; K = M sends all to everyone.
    Default: the paper."""
    common: str = "pretrain"
    """The common expert: pretrain, or a file (HDF5 of this program, or weights saved by torch).
    Default: it needs no file."""
    common_model: str = "auto"
    """Its architecture: auto = the experts'; a torchvision name reads a file of torchvision's own weights.
    Default: in the paper the common expert has the experts' architecture."""
    common_share: float = Field(0.2, gt=0, lt=1)
    """pretrain: share of all rows that the server keeps for it.
    Default: on the digits, 360 of 1,797 samples are enough to train it to 90 %."""
    common_target: float = Field(0.9, ge=0, le=1)
    """pretrain: stop at this accuracy on the fifth of the reserved rows that is not trained on.
    Default: well above the paper's break-point near 66 %."""
    common_epochs: int = Field(50, ge=1)
    """pretrain: epochs at most. Default: an upper bound; on the digits 90 % takes fewer than ten."""
    common_rate: float = Field(0.2, gt=0)
    """pretrain: its learning rate as a multiple of train.lr_shared.
    Default: 0.01 with the default `train.lr_shared`, the papers' value; 0.05 diverges with momentum over many
    epochs."""
    anchors: Literal["labels", "clusters"] = "labels"
    """Choose anchors by the clients' label counts, or by clusters of their mean embeddings, without labels.
    Default: the paper."""
    anchors_active: float = Field(0.5, ge=0)
    """Anchors in a round: below 1 a share of the cohort, else their number; 0 = no anchors.
    Default: in the paper half is best."""
    anchor_loss: float = Field(1.0, ge=0)
    """Weight of an anchor's loss that teaches the gate. Default: our reading; the paper gives no value."""
    renormalise: bool = True
    """If true, the weights of the K experts add up to 1.
    Default: only the K chosen experts make up the mixture."""
    gate_frozen: bool = False
    """If true, the gate keeps its initial values. Default: the method trains its gate; true is a control."""


class FedJETs(Algorithm):
    beyond_gradients = "the gate chooses experts by the embeddings of a client's samples"
    homogeneous = True

    def __init__(self, task: Task) -> None:
        options: Any = task.config.options
        self._common = common.Common(task, options.common, options.common_model)
        clustered = options.anchors == "clusters" and options.anchors_active
        self.prepared_size = self._common.width if clustered else 0
        super().__init__(task)
        number = options.experts or min(5, max(2, len(task.training) // 2), len(task.training))
        if number > len(task.training) and options.anchors_active:
            most = len(task.training)
            problem = f"fedjets.experts = {number}, but every expert needs an anchor and {most} clients train"
            raise ConfigError(problem, f"use --fedjets.experts {most} or less, or raise --clients")
        self.experts = number
        self._names = [f"expert{m}" for m in range(number)]
        self._top = min(options.top, number)
        self._cached_anchors: tuple[Tensor, list[int]] | None = None  # with the `prepared` they come from
        self._gate = Module(f"gate of {number} experts", partial(self._build_gate, number))
        sizes = {name: part.layout().size for name, part in (("gate", self._gate), ("c", self._common.part))}
        self.bytes_once = 4 * (sizes["c"] + self.prepared_size + options.gate_frozen * sizes["gate"])

    def state(self) -> Spec:
        """Return W_1..W_M, W_r, W_c, and the accuracy to which W_c was trained."""
        experts = {name: self.task.model(self.task.pool[0]) for name in self._names}
        frozen: Spec = {"common": self._common.part, "common_accuracy": TensorPart((1,), math.nan)}
        return {**experts, "gate": self._gate, **frozen}

    def _build_gate(self, experts: int) -> Gate:
        """Return the gate, embeddings (B, width) to weights (B, experts)."""
        width, hidden = self._common.width, self.task.config.gate.hidden
        return Gate(width, experts, hidden=hidden, input_norm="none", batch_norm=False, activation="relu")

    def payload(self, sizes: Mapping[str, int]) -> Mapping[str, Block]:
        """Return one block per expert, of weight 0 if a client did not train it, and the gate."""
        return {name: Block(sizes[name]) for name in (*self._names, *self._learned_gate)}

    @property
    def _learned_gate(self) -> list[str]:
        """The gate's name, unless it is frozen."""
        return [] if self.options.gate_frozen else ["gate"]

    # Before round 1

    @classmethod
    def reserve(cls, config: Config) -> float:
        """Return the share of all rows reserved for the common expert; 0 if it is read from a file."""
        options: Any = config.options
        return float(options.common_share) if options.common == common.PRETRAIN else 0.0

    def check(self) -> None:
        """Check the common expert's file."""
        self._common.from_file(self.read_weights)

    def pretrain(self, turn: Turn) -> str:
        """Read W_c from its file, or train it by SGD on the reserved rows until it is accurate enough."""
        vector = self._common.from_file(self.read_weights)
        if vector is not None:
            turn.parts.vector("common").copy_(vector)
            return f"common expert: read from {self.options.common}"
        options = self.options
        rate = options.common_rate * self.task.config.train.lr_shared
        phase = self.phase({"common": rate}, options.common_epochs)
        return common.train(turn, phase, options.common_target, self.task.config.train.batch)

    def prepare(self, parts: Parts, inputs: Inputs) -> Tensor:
        """Return the mean embedding of a client's samples (d,)."""
        embeddings = torch.cat([self._common.embed(parts, x) for x in inputs()])
        return embeddings.double().mean(0).float()

    # Who trains

    @property
    def anchors(self) -> list[int]:
        """Anchor q of every expert q; empty without anchors. With clusters it is valid after `prepare`."""
        if self._cached_anchors is None or self._cached_anchors[0] is not self.prepared:
            self._cached_anchors = self.prepared, self._choose_anchors()
        return self._cached_anchors[1]

    def _choose_anchors(self) -> list[int]:
        """Return anchors among the clients that train from round 1 on, or among all if these are too few."""
        clients = [k for k in self.task.training if k not in self.task.late]
        clients = clients if len(clients) >= len(self._names) else self.task.training
        if not self.options.anchors_active:
            return []
        if self.options.anchors == "clusters":
            return by_cluster(self.prepared.numpy(), clients, len(self._names))
        return by_label(self.task.counts, clients, len(self._names))

    def cohort(self, round: int) -> list[tuple[int, str]]:
        """Return a cohort of the default size, with the configured share of anchors as far as available."""
        config, active = self.task.config, self.options.anchors_active
        joined = [k for k in self.task.training if k not in self.task.absent_clients(round)]
        size = max(1, int(config.participation * len(joined) + 0.5)) if joined else 0
        anchors = [k for k in joined if k in self.anchors]
        others = [k for k in joined if k not in anchors]
        requested = int(active * size + 0.5) if active < 1 else int(active)
        number_others = min(len(others), size - min(requested, size, len(anchors)))
        number_anchors = min(len(anchors), size - number_others)
        members = [(k, "client") for k in self._draw("cohort", round, others, number_others)]
        members += [(k, "anchor") for k in self._draw("anchors", round, anchors, number_anchors)]
        return sorted(members)

    def _draw(self, purpose: str, round: int, clients: Sequence[int], number: int) -> list[int]:
        """Draw a number of clients without replacement."""
        generator = seeds.numpy_generator(self.task.config.seed, purpose, round)
        members: list[int] = generator.choice(np.array(clients, int), number, replace=False).tolist()
        return members

    # Training

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train K experts that the gate chooses, or the anchor's expert, and the gate unless it is frozen."""
        parts = turn.parts
        embeddings = torch.cat([self._common.embed(parts, batch.x) for batch in turn.batches("train")])
        if turn.role == "anchor":
            chosen = [self.anchors.index(turn.client)]
            loss = partial(self._anchor_loss, parts, embeddings, chosen[0])
        else:
            chosen = self._choose_experts(parts.gate(embeddings).detach().double().sum(0))
            loss = partial(self._client_loss, parts, embeddings, chosen, self._on_device(chosen, embeddings))
        names = [*(self._names[m] for m in chosen), *self._learned_gate]
        turn.sgd(self._phase(names), loss)
        values = {name: parts.vector(name) for name in names}
        turn.bytes_down = 4 * sum(value.numel() for value in values.values())
        return values

    def phases(self, role: str) -> list[Phase]:
        """Return the phase of all experts and the gate; a client step trains K of these experts."""
        return [self._phase([*self._names, *self._learned_gate])]

    def _phase(self, names: Sequence[str]) -> Phase:
        """Return a phase with the configured optimiser for experts and plain SGD for the gate."""
        train = self.task.config.train
        rates = {name: train.lr_gate if name == "gate" else train.lr_shared for name in names}
        return self.phase(rates, plain={"gate"})

    def _anchor_loss(self, parts: Parts, embeddings: Tensor, q: int, batch: Batch) -> Tensor:
        """Return an anchor's loss: expert q on the labels, and the gate towards expert q."""
        loss = F.cross_entropy(getattr(parts, self._names[q])(batch.x), batch.y)
        if self.options.gate_frozen:
            return loss
        weight = parts.gate(embeddings[batch.rows])[:, q].clamp_min(torch.finfo(torch.float32).tiny)
        return loss - self.options.anchor_loss * weight.log().mean()

    def _client_loss(
        self, parts: Parts, embeddings: Tensor, chosen: list[int], index: Tensor, batch: Batch
    ) -> Tensor:
        """Return the cross-entropy of the mixture of the chosen experts."""
        mixture = self._mixture(parts, chosen, index, batch.x, embeddings[batch.rows])
        return F.cross_entropy(mixture.answer(), batch.y)

    def _on_device(self, chosen: list[int], like: Tensor) -> Tensor:
        """Return the chosen experts where `like` is: indexing by a list would copy it for every batch."""
        return torch.tensor(chosen, device=like.device)

    def _choose_experts(self, scores: Tensor) -> list[int]:
        """Return the top K of scores (M,), ascending; among equal scores the first."""
        return sorted(scores.argsort(descending=True, stable=True)[: self._top].tolist())

    def _outputs(self, parts: Parts, x: Tensor, chosen: list[int]) -> Tensor:
        """Return the logits of the chosen experts, (B, K, classes)."""
        return torch.stack([getattr(parts, self._names[m])(x).float() for m in chosen], 1)

    def _mixture(
        self, parts: Parts, chosen: list[int], index: Tensor, x: Tensor, embeddings: Tensor
    ) -> Mixture:
        """Return Σ_m g_m(x̂) W_m(x) as weights of all M experts, (B, M), and outputs of the chosen ones.

        `index` is `chosen` on the device.
        """
        weights = parts.gate(embeddings)
        among = weights[:, index]
        if self.options.renormalise:
            among = among / among.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)

        def combine(outputs: Sequence[Tensor], weights: Tensor) -> Tensor:
            return (weights[:, index].unsqueeze(2) * outputs[0]).sum(1)

        weights = torch.zeros_like(weights).index_copy(1, index, among)
        return Mixture(weights, lambda: [self._outputs(parts, x, chosen)], combine, evaluated=chosen)

    # Evaluation

    def predictor(self, parts: Parts, inputs: Inputs, unseen: bool) -> Callable[[Tensor], Tensor]:
        """Return the mixture of the top K over all samples, or for unseen clients the best per sample."""
        if not unseen:
            mixed = self.mixture(parts, inputs)
            return lambda x: mixed(x).answer()
        chosen, index = self._chosen(parts, inputs)

        def predict_best(x: Tensor) -> Tensor:
            best = parts.gate(self._common.embed(parts, x))[:, index].argmax(1)
            return self._outputs(parts, x, chosen)[torch.arange(len(x), device=x.device), best]

        return predict_best

    def mixture(self, parts: Parts, inputs: Inputs) -> Callable[[Tensor], Mixture]:
        """Return the mixture of the K experts that the gate chooses over all samples."""
        chosen, index = self._chosen(parts, inputs)
        return lambda x: self._mixture(parts, chosen, index, x, self._common.embed(parts, x))

    def _chosen(self, parts: Parts, inputs: Inputs) -> tuple[list[int], Tensor]:
        """Return the K experts that the gate chooses over all samples; also on the device."""
        scores = torch.zeros(self.experts, dtype=torch.float64, device=parts.vector("gate").device)
        for x in inputs():
            scores += parts.gate(self._common.embed(parts, x)).double().sum(0)
        chosen = self._choose_experts(scores)
        return chosen, self._on_device(chosen, scores)

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """Return the mixture of the K experts that the gate chooses over these samples."""
        return self.predictor(parts, lambda: iter([x]), unseen=False)(x)
