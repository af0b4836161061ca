"""pFedAFM: learned weights mix a private and a small shared extractor in every dimension, trained in turn.

Yi, Yu, Ren, Zhang, Wang, Liu, Li: "pFedAFM: Adaptive Feature Mixture for Batch-Level Personalization in
Heterogeneous Federated Learning", arXiv 2404.17847, 2024. Written from its abstract and the authors' released
code, without equation numbers. Client k has its own model, an extractor F_k^ex and a head F_k^hd with the
parameters ω_k, and weights α_k in [0, 1]^d, at first 1; G is the shared extractor with parameters θ. With ⊙,
the product in each dimension,

    r = (1 − α_k) ⊙ G(x; θ) + α_k ⊙ F_k^ex(x; ω_k)             ŷ = F_k^hd(r; ω_k)

a client of the cohort trains for E epochs with θ as received, and then for E epochs with ω_k as they became:

    1. ω_k ← ω_k − η_ω ∇ CE(ŷ, y)     α_k ← clip(α_k − η_α ∇ CE(ŷ, y), 0, 1)    in every step
    2. θ_k ← θ_k − η_θ ∇ CE(F_k^hd(G(x; θ_k)), y)

The server sets θ = Σ n_k θ_k / Σ n_k over the cohort. ŷ answers. η_ω, η_α and η_θ are `train.lr`,
`train.lr_gate` and `train.lr_shared` (the authors' code: 0.01 all three).

Shared: θ, one float32 vector per client and round; ω_k and α_k never leave their client.

Departures: n_k counts training samples (the authors' code: test samples too). The gradient of step 1 is
clipped by its joint norm over ω_k and α_k (the authors' code: over ω_k alone). Momentum starts at zero in
both steps (the authors' code carries that of θ and of α_k from client to client). An extractor that is not
trained is in evaluation mode. After a client's training it is measured with its θ_k (the authors' code:
between the steps, with θ as received). The server sums, and α_k is the client's own (the authors' code keeps
references to the tensors in which all clients train in turn, not copies: its sum is the θ_k of the round's
last client, and a client goes on from the α of the client before it).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from pfedmoe_mpi.algorithms.base import Algorithm, Module, Phase, Spec
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Turn


class Weights(nn.Module):
    """Weights α (d,), at first 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(dim))

    def forward(self, general: Tensor, own: Tensor) -> Tensor:
        """Return (1 − α) ⊙ general + α ⊙ own, (B, d)."""
        return (1 - self.alpha) * general + self.alpha * own


class PFedAFM(Algorithm):
    def state(self) -> Spec:
        """Return θ."""
        return {"shared": self.task.extractor(self.task.shared)}

    def client_state(self, client: int) -> Spec:
        """Return ω_k, the client's own model, and α_k."""
        return {
            "model": self.task.model(self.task.architecture(client)),
            "weights": Module("mixing weights", partial(Weights, self.task.dim)),
        }

    def phases(self, role: str) -> list[Phase]:
        """Return two phases: ω_k and α_k, then θ."""
        train = self.task.config.train
        return [
            self.phase({"model": train.lr, "weights": train.lr_gate}),
            self.phase({"shared": train.lr_shared}),
        ]

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train ω_k and α_k, then θ_k through the client's head."""
        parts, (own, general) = turn.parts, self.phases(turn.role)

        def through_head(batch: Batch) -> Tensor:
            return nn.functional.cross_entropy(parts.model.head(parts.shared(batch.x)), batch.y)

        self.tune(turn, own)
        turn.sgd(general, through_head)
        return {"shared": parts.vector("shared")}

    def tune(self, turn: Turn, phase: Phase) -> None:
        """Train ω_k and α_k, which is kept between 0 and 1."""
        alpha = turn.parts.vector("weights")

        def clip(steps: int) -> bool:
            alpha.clamp_(0, 1)
            return False

        turn.sgd(phase, enough=clip)

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """Return ŷ (B, classes)."""
        mixed = parts.weights(parts.shared(x), parts.model.extractor(x))
        logits: Tensor = parts.model.head(mixed)
        return logits
