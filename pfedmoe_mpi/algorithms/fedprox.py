"""FedProx: FedAvg with a proximal term that holds clients near the global model.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: "Federated Optimization in Heterogeneous Networks", MLSys 2020.
A client minimises h_k(w; w^t) = F_k(w) + μ/2·‖w − w^t‖² from w^t (eq. 2, Algorithm 2); the server averages.

Shared: the whole model, including BatchNorm's running statistics, one float32 vector per client and round.

Departures: the cohort is drawn uniformly and averaged by samples, as in FedAvg; Algorithm 2 draws clients
with probability p_k and averages without weights. Every client trains the configured number of epochs, and
these determine γ, the inexactness of a local solution; slow clients are left out (`faults.deadline`) instead
of training less. The norm is over parameters; running statistics have no proximal term. The term's gradient
is included in `train.clip`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from pfedmoe_mpi.algorithms.base import Algorithm, Phase, Spec
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Turn


class Options(Section):
    mu: float = Field(0.1, ge=0)
    """μ, weight of the proximal term; 0 is FedAvg. Default: within the paper's grid from 0.001 to 1."""


class FedProx(Algorithm):
    homogeneous = True

    def state(self) -> Spec:
        """Return w, the global model."""
        return {"model": self.task.model(self.task.pool[0])}

    def phases(self, role: str) -> list[Phase]:
        return [self.phase({"model": self.task.config.train.lr_shared})]

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        logits: Tensor = parts.model(x)
        return logits

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train by SGD on h_k, starting at w^t."""
        start = turn.parts.parameter_vector("model").clone()
        pieces = start.split([p.numel() for p in turn.parts.parameters("model")])

        def loss(batch: Batch) -> Tensor:
            parameters = turn.parts.parameters("model")
            squares = [(p.view(-1) - w).square().sum() for p, w in zip(parameters, pieces, strict=True)]
            return self.loss(turn.parts, batch) + self.options.mu / 2 * torch.stack(squares).sum()

        for phase in self.phases(turn.role):
            turn.sgd(phase, loss)
        return {"model": turn.parts.vector("model")}
