"""FedMRL: nested (Matryoshka) pieces of one fused representation go to a shared and to a private head.

Yi, Yu, Ren, Wang, Liu, Li: "Federated Model Heterogeneous Matryoshka Representation Learning", NeurIPS 2024.
All clients train one small homogeneous model, extractor G^ex (to d1) and head G^hd, beside their own model,
extractor F_k^ex (to d2 ≥ d1) and head F_k^hd, and a private linear projector P_k from d1 + d2 to d2:

    R~ = P_k(G^ex(x) ∘ F_k^ex(x)), spliced           ŷ_G = G^hd(R~[:d1])           ŷ_F = F_k^hd(R~)
    loss = m_1·CE(ŷ_G, y) + m_2·CE(ŷ_F, y)

One SGD step updates all three. The server averages the small models with weight n_k; a client answers with
ŷ_F. A client that never trained has no answer: the input of the shared head comes from a private projector,
and no step trains the small model to answer by itself.

Shared: the small model with its head, one float32 vector per client and round.

Departures: n_k counts training samples (the authors' code: test samples too). The gradient is clipped by its
joint norm (the authors' code: each of the three by its own norm). Momentum starts at zero in every client
step (the authors' code carries the momentum of the small model and of the projector from client to client).
The server sums (the authors' code keeps references to the tensors in which all clients train in turn, not
copies: its sum is the small model of the round's last client).
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pfedmoe_mpi.algorithms.base import Algorithm, Module, Phase, Spec, Task
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.errors import ConfigError


class Options(Section):
    dim: int = Field(0, ge=0)
    """d1, length of the shared model's representation, at most d = model.dim.
    Default: 0 = half of d, as in the authors' small models (250 of 500)."""
    weight_shared: float = Field(1.0, ge=0)
    """m_1, weight of the shared head's cross-entropy. Default: the authors' code."""
    weight_own: float = Field(1.0, ge=0)
    """m_2, weight of the private head's cross-entropy. Default: the authors' code."""


class FedMRL(Algorithm):
    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._d1 = self.options.dim or max(1, task.dim // 2)
        if self._d1 > task.dim:
            problem = (
                f"fedmrl.dim = {self._d1} exceeds model.dim = {task.dim}, the private representation's length"
            )
            raise ConfigError(problem, f"use --fedmrl.dim {task.dim}, or raise --model.dim")

    def state(self) -> Spec:
        """Return the small model; its representation has length d1."""
        return {"shared": self.task.model(self.task.shared, self._d1)}

    def client_state(self, client: int) -> Spec:
        """Return the client's own model and its projector."""
        build = partial(torch.nn.Linear, self._d1 + self.task.dim, self.task.dim)
        model = self.task.model(self.task.architecture(client))
        return {"model": model, "projector": Module("projector", build)}

    def phases(self, role: str) -> list[Phase]:
        """Return one phase that trains small model, own model and projector together."""
        train = self.task.config.train
        return [self.phase({"shared": train.lr_shared, "model": train.lr, "projector": train.lr})]

    def fuse(self, parts: Parts, x: Tensor) -> Tensor:
        """Return R~ (B, d2), the input of both heads."""
        spliced = torch.cat([parts.shared.extractor(x), parts.model.extractor(x)], 1)
        representation: Tensor = parts.projector(spliced)
        return representation

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """Return ŷ_F (B, classes)."""
        logits: Tensor = parts.model.head(self.fuse(parts, x))
        return logits

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        """Return m_1·CE(ŷ_G, y) + m_2·CE(ŷ_F, y)."""
        r = self.fuse(parts, batch.x)
        coarse = functional.cross_entropy(parts.shared.head(r[:, : self._d1]), batch.y)
        fine = functional.cross_entropy(parts.model.head(r), batch.y)
        return self.options.weight_shared * coarse + self.options.weight_own * fine
