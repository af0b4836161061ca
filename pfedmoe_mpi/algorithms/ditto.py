"""Ditto: every client keeps a personal model close to the global one.

Li, Hu, Beirami, Smith: "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021,
algorithm 1. A client trains w as in FedAvg, and its v_k on F_k(v) + λ/2 ‖v − w^t‖² from the w^t it received.
v_k begins as w^0.

Shared: w, the model, one float32 vector per client and round; v_k never leaves its client.

Departures: v_k trains for `train.epochs`, like w, and before it. The mean weighs clients by samples. The norm
is over parameters; running statistics have no such term, and its gradient is included in `train.clip`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from pfedmoe_mpi.algorithms.base import Algorithm, Parts, Phase, Spec
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.turn import Turn


class Options(Section):
    weight: float = Field(0.1, ge=0)
    """λ, weight of the distance to the global model; 0 is local training besides FedAvg.
    Default: our choice; the paper chooses it for each data set."""


class Ditto(Algorithm):
    homogeneous = True
    apart = ("personal",)

    def state(self) -> Spec:
        """Return w."""
        return {"model": self.task.model(self.task.pool[0])}

    def client_state(self, client: int) -> Spec:
        """Return v_k."""
        return {"personal": self.task.model(self.task.pool[0])}

    def initial(self, part: str, client: int) -> str:
        """Return that v_k begins as w^0."""
        return "model"

    def phases(self, role: str) -> list[Phase]:
        """Return the phase of v_k, then that of w."""
        train = self.task.config.train
        return [self.phase({"personal": train.lr}), self.phase({"model": train.lr_shared})]

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train v_k towards w^t, then w."""
        parts, (of_personal, of_model) = turn.parts, self.phases(turn.role)
        pieces = [p.detach().clone() for p in parts.parameters("model")]

        def personal(batch: Batch) -> Tensor:
            pairs = zip(parts.parameters("personal"), pieces, strict=True)
            distance = torch.stack([(v - w).square().sum() for v, w in pairs]).sum()
            error = torch.nn.functional.cross_entropy(parts.personal(batch.x), batch.y)
            return error + self.options.weight / 2 * distance

        def shared(batch: Batch) -> Tensor:
            return torch.nn.functional.cross_entropy(parts.model(batch.x), batch.y)

        turn.sgd(of_personal, personal)
        turn.sgd(of_model, shared)
        return {"model": parts.vector("model")}

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """Return what v_k predicts."""
        logits: Tensor = parts.personal(x)
        return logits
