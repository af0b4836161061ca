"""FedProto: clients share the mean representation of each class and pull their own towards the global one.

Tan, Long, Liu, Zhou, Lu, Jiang, Zhang: "FedProto: Federated Prototype Learning across Heterogeneous Clients",
AAAI 2022. Client prototypes C_i^(j) = mean of the representations of class j (eq. 3); global prototype
C̄^(j) = mean over the clients that hold class j, weighted by |D_ij| / N_j, their samples of it (eq. 6); local
loss = cross-entropy + λ·distance of own prototypes to global ones (eqs. 7 and 8).

Shared: one vector of length d per class held up, one per class with a prototype down, per client and round;
no module travels.

Departures: eq. 6 prints an extra factor 1/|N_j|, which would shrink C̄ with every client that holds the
class; the authors' code has that factor and no weights, an unweighted mean. N_j counts the cohort. Own
prototypes are taken after training, in evaluation mode (the authors' code collects them while the last epoch
trains). The distance is per sample, as in the authors' code: the mean squared difference of its
representation to the global prototype of its class, over batch and d; samples whose class has none yet carry
no distance. The answer is the model's own head, not the nearest prototype (eq. 4), as in the tables of arXiv
2402.01350.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pfedmoe_mpi.algorithms._per_class import class_means
from pfedmoe_mpi.algorithms.base import Algorithm, Block, Phase, Spec, TensorPart
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Turn


class Options(Section):
    weight: float = Field(1.0, ge=0)
    """λ, weight of the distance to the global prototypes."""


class FedProto(Algorithm):
    def state(self) -> Spec:
        """C̄ (classes, d), NaN where a class has no prototype yet."""
        return {"prototypes": TensorPart((self.task.classes, self.task.dim), fill=float("nan"))}

    def client_state(self, client: int) -> Spec:
        """ω_k, the client's own model."""
        return {"model": self.task.model(self.task.architecture(client))}

    def payload(self, sizes: Mapping[str, int]) -> Mapping[str, Block]:
        """One row per class, weighted by the client's samples of it."""
        return {"prototypes": Block(self.task.dim, rows=self.task.classes, weight="class_samples")}

    def phases(self, role: str) -> list[Phase]:
        return [self.phase({"model": self.task.config.train.lr})]

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        logits: Tensor = parts.model(x)
        return logits

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        """Eq. 7, the distance per sample."""
        r = parts.model.extractor(batch.x)
        loss = functional.cross_entropy(parts.model.head(r), batch.y)
        target = parts.prototypes[batch.y]
        known = ~target.isnan().any(1)
        distance = torch.where(known[:, None], r.float() - target.nan_to_num(), 0.0)
        return loss + self.options.weight * distance.square().mean()

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train, then take the mean representation of every class over the training samples (eq. 3)."""
        known = turn.parts.prototypes[~turn.parts.prototypes.isnan().any(1)]
        turn.bytes_down = 4 * known.numel()
        for phase in self.phases(turn.role):
            turn.sgd(phase)
        return {"prototypes": class_means(turn, self.task.classes, turn.parts.model.extractor)}
