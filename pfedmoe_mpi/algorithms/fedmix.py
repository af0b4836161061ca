"""FedMix: M shared experts and a shared gate over all of them, trained together by every client.

Reisser, Louizos, Gavves, Welling: "Federated Mixture of Experts", arXiv 2107.06724, 2021; here as the
baseline of FedJETs (Dun et al., arXiv 2306.08586), where every client gets all M experts (M = K = 2).
A client maximises the likelihood of the mixture over its samples,

    p(y | x) = Σ_m g_m(x; φ) softmax(W_m(x))_y        loss = −log p(y | x)

in one SGD step over W_1..W_M and φ together; the server averages all of them, weighted by samples.

Shared: M models and the gate, per client and round, each way.

Departures: the paper trains a selection of the experts that suits the client; as a baseline of FedJETs all
go to everyone, and the gate is one network, averaged like the experts. It sees the raw input (`gate.*` is its
design): FedMix has no common expert whose embeddings it could see.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from pfedmoe_mpi.algorithms.base import Algorithm, Phase, Spec, Task
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.errors import ConfigError

LEAST = 1e-30  # weight of an expert that top-1 routing left out: its logarithm is finite


class Options(Section):
    experts: int = Field(2, ge=2)
    """Experts M, all sent to every client."""


class FedMix(Algorithm):
    homogeneous = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if task.config.gate.input == "shared":
            raise ConfigError(
                "gate.input is shared, but fedmix has no shared representation", "--gate.input raw"
            )
        self._names = [f"expert{m}" for m in range(self.options.experts)]

    def state(self) -> Spec:
        """W_1..W_M and φ."""
        experts = {name: self.task.model(self.task.pool[0]) for name in self._names}
        return {**experts, "gate": self.task.gate(len(experts))}

    def phases(self, role: str) -> list[Phase]:
        """Everything together."""
        train = self.task.config.train
        return [self.phase({**dict.fromkeys(self._names, train.lr_shared), "gate": train.lr_gate})]

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """log p(y | x) (B, classes)."""
        weights: Tensor = parts.gate(self.task.seen(x, getattr(parts, self._names[0]).extractor))
        each = [getattr(parts, name)(x).float().log_softmax(1) for name in self._names]
        return (torch.stack(each, 1) + weights.clamp_min(LEAST).log().unsqueeze(2)).logsumexp(1)

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        """−log p(y | x), the mean over the batch."""
        return torch.nn.functional.nll_loss(self.predict(parts, batch.x), batch.y)
