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

The gate sees the raw sample; of a text, whose token numbers mean nothing, it sees the shared extractor's
embeddings of the n tokens as one (their mean times √n: `models.text.pooled`), and sends no gradient into it.

Beyond the paper, off by default: several shared extractors, and the variants of the gate (`gate.*`) that it
leaves as open questions. `unseen.private` average makes gate and head cross too (for the digits 70,094 and
5,010 numbers, up only): a client that never trained answers with their means, ŷ = head(Σ_i α_Gi r_Gi). It
has no trained extractor of its own, so α_F r_F is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from pfedmoe_mpi.algorithms.base import Algorithm, Inputs, Phase, Spec, Task
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Turn


class Options(Section):
    share: bool = True
    """False switches the sum off: every client keeps a shared extractor of its own (an ablation)."""
    extractors: int = Field(1, ge=1)
    """Shared extractors G_1..G_m; the gate weighs m + 1 experts (the paper has one)."""


class PFedMoE(Algorithm):
    averages_private = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._names = ["shared", *(f"shared{number}" for number in range(2, self.options.extractors + 1))]
        self._averages = task.config.unseen.private == "average" and self.options.share

    def state(self) -> Spec:
        """θ, the shared extractor, or θ_1..θ_m; for unseen clients the mean gate and head, if asked for."""
        means = {"mean_gate": self.task.gate(1 + len(self._names)), "mean_head": self.task.head()}
        return {**self._theta(), **(means if self._averages else {})} if self.options.share else {}

    def client_state(self, client: int) -> Spec:
        """ω_k, the client's own model, and φ_k, its gate."""
        own = {
            "model": self.task.model(self.task.architecture(client)),
            "gate": self.task.gate(1 + len(self._names)),
        }
        return own if self.options.share else {**self._theta(), **own}

    def _theta(self) -> Spec:
        return {name: self.task.extractor(self.task.shared) for name in self._names}

    def phases(self, role: str) -> list[Phase]:
        """θ, ω and φ together."""
        train = self.task.config.train
        shared = dict.fromkeys(self._names, train.lr_shared)
        return [self.phase({**shared, "model": train.lr, "gate": train.lr_gate})]

    def weights(self, parts: Parts, x: Tensor) -> Tensor:
        """(α_G1, …, α_Gm, α_F) of every sample, (B, m + 1)."""
        return self._alpha(parts, x, self._shared(parts, x) if self._gate_sees_shared else [])

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """ŷ (B, classes)."""
        general = self._shared(parts, x)
        alpha = self._alpha(parts, x, general).unsqueeze(2).unbind(1)
        r = sum(a * g for a, g in zip(alpha, [*general, parts.model.extractor(x)], strict=True))
        logits: Tensor = parts.model.head(r)
        return logits

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """θ_k, and φ_k and the head where their means are asked for: they go up, and down only once."""
        values = dict(super().client_step(turn))
        if self._averages:
            parts, head = turn.parts, turn.parts.model.head
            values["mean_gate"] = parts.vector("gate")
            values["mean_head"] = torch.cat([head.weight.detach().reshape(-1), head.bias.detach()])
            turn.bytes_down = 4 * sum(values[name].numel() for name in self._names)
        return {name: value for name, value in values.items() if value.numel()}  # equal weights are none

    def answer(self, parts: Parts, inputs: Inputs, unseen: bool) -> Callable[[Tensor], Tensor] | None:
        """The whole mixture; for a client that never trained what the means give, if there are any."""
        if unseen and self._averages:
            return partial(self._without_own, parts)
        return super().answer(parts, inputs, unseen)

    @property
    def unseen_null(self) -> str:
        return "" if self._averages else super().unseen_null

    def _without_own(self, parts: Parts, x: Tensor) -> Tensor:
        """head(Σ_i α_Gi r_Gi) (B, classes), with the mean gate and head."""
        general = self._shared(parts, x)
        alpha = parts.mean_gate(self._seen(parts, x, general))
        r = sum(alpha[:, i : i + 1] * g for i, g in enumerate(general))
        logits: Tensor = parts.mean_head(r)
        return logits

    @property
    def _gate_sees_shared(self) -> bool:
        return self.task.config.gate.input == "shared"

    def _shared(self, parts: Parts, x: Tensor) -> list[Tensor]:
        """r_G1, …, r_Gm, each (B, d)."""
        return [getattr(parts, name)(x) for name in self._names]

    def _alpha(self, parts: Parts, x: Tensor, general: list[Tensor]) -> Tensor:
        """The gate's weights (B, m + 1)."""
        alpha: Tensor = parts.gate(self._seen(parts, x, general))
        return alpha

    def _seen(self, parts: Parts, x: Tensor, general: list[Tensor]) -> Tensor:
        """What the gate sees, and sends no gradient into: x, or the first shared representation.

        Of a text, x is the embeddings of its tokens by the first shared extractor, as one.
        """
        return general[0].detach() if self._gate_sees_shared else self.task.seen(x, parts.shared)
