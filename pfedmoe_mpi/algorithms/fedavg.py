"""FedAvg: every client trains the one global model; the server averages it, weighted by samples.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas: "Communication-Efficient Learning of Deep Networks from
Decentralized Data", AISTATS 2017, Algorithm 1: w_{t+1} = Σ_{k∈S_t} n_k / m_t · w^k_{t+1} with m_t =
Σ_{k∈S_t} n_k, as corrected in arXiv 1602.05629v4 (the proceedings of 2017 divide by the samples of all
clients).

Shared: the whole model, including BatchNorm's running statistics, one float32 vector per client and round.

Departure: local steps are those of the configured optimiser, by default SGD with momentum, which starts at
zero in every client step; the paper's SGD is plain.
"""

from __future__ import annotations

from torch import Tensor

from pfedmoe_mpi.algorithms.base import Algorithm, Phase, Spec
from pfedmoe_mpi.core.parts import Parts


class FedAvg(Algorithm):
    homogeneous = True

    def state(self) -> Spec:
        """Return w, the global model."""
        return {"model": self.task.model(self.task.pool[0])}

    def phases(self, role: str) -> list[Phase]:
        return [self.phase({"model": self.task.config.train.lr_shared})]

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        logits: Tensor = parts.model(x)
        return logits
