"""FedProto: clients share the mean representation of each class and pull their own towards the global one.

Tan, Long, Liu, Zhou, Lu, Jiang, Zhang: "FedProto: Federated Prototype Learning across Heterogeneous
Clients", AAAI 2022. Client prototypes are C_i^(j) = mean of the representations of class j (eq. 3). The
global prototype C̄^(j) is the mean over the clients that hold class j, weighted by |D_ij| / N_j, their
samples of it (eq. 6). The local loss is cross-entropy + λ·distance of the client's prototypes to the global
ones (eqs. 7 and 8).

Shared: one vector of length d per class held up, one per class with a prototype down, per client and round;
no module travels.

Departures: eq. 6 prints an extra factor 1/|N_j|, which would shrink C̄ with every client that holds the
class; the authors' code has that factor and no weights, an unweighted mean. N_j counts the cohort. Client
prototypes are computed after training, in evaluation mode (the authors' code collects them during the last
epoch). The distance is per sample, as in the authors' code: the mean squared difference between its
representation and the global prototype of its class, over batch and d; samples of a class without a
prototype contribute no distance. By default a client answers with its model's own head, not by the nearest
prototype (eq. 4), as in the tables of arXiv 2402.01350. With `fedproto.answer` = prototype it answers with
the class, of those that have a global prototype, whose prototype has the least mean squared difference to
its representation; until the first sum, when no class has one, the head answers. Cross-entropy is infinite
for a test sample of a class without a prototype, and the client's loss is then null.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pfedmoe_mpi.algorithms._per_class import class_means, nearest_prototype
from pfedmoe_mpi.algorithms.base import Algorithm, Block, Inputs, Phase, Spec, TensorPart
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Turn


class Options(Section):
    weight: float = Field(1.0, ge=0)
    """λ, weight of the distance to the global prototypes. Default: λ of the authors' code."""
    answer: Literal["head", "prototype"] = "head"
    """What a client answers with: its head, or the nearest global prototype (eq. 4), once there is one.
    Default: the head, as in the tables of pFedMoE's paper."""


class FedProto(Algorithm):
    beyond_gradients = "clients send mean representations of their samples"

    def state(self) -> Spec:
        """Return C̄ (classes, d), NaN in the row of a class without a prototype."""
        return {"prototypes": TensorPart((self.task.classes, self.task.dim), fill=float("nan"))}

    def client_state(self, client: int) -> Spec:
        """Return ω_k, the client's own model."""
        return {"model": self.task.model(self.task.architecture(client))}

    def payload(self, sizes: Mapping[str, int]) -> Mapping[str, Block]:
        """Return one row per class, weighted by the client's samples of it."""
        return {"prototypes": Block(self.task.dim, rows=self.task.classes, weight="class_samples")}

    def phases(self, role: str) -> list[Phase]:
        return [self.phase({"model": self.task.config.train.lr})]

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        logits: Tensor = parts.model(x)
        return logits

    def predictor(self, parts: Parts, inputs: Inputs, unseen: bool) -> Callable[[Tensor], Tensor] | None:
        """Return the head's logits, or those of the nearest prototype where any class has one."""
        default = super().predictor(parts, inputs, unseen)
        if self.options.answer == "head" or default is None or bool(parts.prototypes.isnan().all()):
            return default
        return partial(nearest_prototype, parts.prototypes, parts.model.extractor)

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        """Return the loss of eq. 7, with the distance per sample."""
        r = parts.model.extractor(batch.x)
        loss = functional.cross_entropy(parts.model.head(r), batch.y)
        target = parts.prototypes[batch.y]
        has_prototype = ~target.isnan().any(1)
        distance = torch.where(has_prototype[:, None], r.float() - target.nan_to_num(), 0.0)
        return loss + self.options.weight * distance.square().mean()

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train, then return the mean representation of every class over the training samples (eq. 3)."""
        defined = turn.parts.prototypes[~turn.parts.prototypes.isnan().any(1)]
        turn.bytes_down = 4 * defined.numel()
        for phase in self.phases(turn.role):
            turn.sgd(phase)
        return {"prototypes": class_means(turn, self.task.classes, turn.parts.model.extractor)}
