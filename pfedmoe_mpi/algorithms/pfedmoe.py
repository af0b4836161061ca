"""pFedMoE: a private gate mixes the client's own extractor with one small shared extractor, per sample.

Yi, Yu, Ren, Zhang, Wang, Liu, Li: "pFedMoE: Data-Level Personalization with Mixture of Experts for
Model-Heterogeneous Personalized Federated Learning", arXiv 2402.01350, 2024.

Client k owns a model F_k = head(ω_k^hd) ∘ extractor(ω_k^ex) of any architecture and a gate H(φ_k), and holds
a copy of the shared extractor G(θ). For every sample x

    r_G = G(x; θ)            r_F = F_k^ex(x; ω_k^ex)            (α_G, α_F) = H(x; φ_k), α_G + α_F = 1
    r   = α_G r_G + α_F r_F        ŷ = F_k^hd(r; ω_k^hd)        loss = cross-entropy(ŷ, y)

and one SGD step updates θ, ω_k and φ_k together, with learning rates η_θ, η_ω and η_φ. Only θ_k leaves the
client; the server sets θ^t = Σ_{k∈S^t} n_k θ_k / Σ_{k∈S^t} n_k.

What is shared: θ, one float32 vector per client and round (CNN-5 without its head: 665,048 numbers, 2.66 MB).

Departures: the mean is normalised over the cohort (the paper prints the total over all clients, which would
shrink θ when C < 1). Steps are the configured SGD: momentum starts at zero in every client step, for θ too,
and the gradient is clipped by its joint norm over θ, ω_k and φ_k.
"""

from __future__ import annotations

from torch import Tensor

from pfedmoe_mpi.algorithms.base import Algorithm, Phase, Spec
from pfedmoe_mpi.config import Section
from pfedmoe_mpi.parts import Parts


class Options(Section):
    share: bool = True
    """False switches the sum off: every client keeps a shared extractor of its own (an ablation)."""


class PFedMoE(Algorithm):
    def state(self) -> Spec:
        """θ, the shared extractor."""
        return self._theta() if self.options.share else {}

    def client_state(self, client: int) -> Spec:
        """ω_k, the client's own model, and φ_k, its gate."""
        own = {"model": self.task.model(self.task.architecture(client)), "gate": self.task.gate()}
        return own if self.options.share else {**self._theta(), **own}

    def _theta(self) -> Spec:
        return {"shared": self.task.extractor(self.task.shared)}

    def phases(self, role: str) -> list[Phase]:
        """θ, ω and φ together."""
        train = self.task.config.train
        return [self.phase({"shared": train.lr_shared, "model": train.lr, "gate": train.lr_gate})]

    def weights(self, parts: Parts, x: Tensor) -> Tensor:
        """(α_G, α_F) of every sample, (B, 2)."""
        alpha: Tensor = parts.gate(x)
        return alpha

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """ŷ (B, classes)."""
        alpha = self.weights(parts, x)
        r = alpha[:, :1] * parts.shared(x) + alpha[:, 1:] * parts.model.extractor(x)
        logits: Tensor = parts.model.head(r)
        return logits
