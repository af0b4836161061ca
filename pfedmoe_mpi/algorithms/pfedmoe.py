"""pFedMoE: a private gate mixes the client's own extractor with one small shared extractor, per sample.

Yi, Yu, Ren, Zhang, Wang, Liu, Li: "pFedMoE: Data-Level Personalization with Mixture of Experts for
Model-Heterogeneous Personalized Federated Learning", arXiv 2402.01350, 2024.

Client k owns a model F_k = head(ω_k^hd) ∘ extractor(ω_k^ex) of any architecture and a gate H(φ_k), and holds
a copy of the shared extractor G(θ). For every sample x

    r_G = G(x; θ)            r_F = F_k^ex(x; ω_k^ex)            (α_G, α_F) = H(x; φ_k), α_G + α_F = 1
    r   = α_G r_G + α_F r_F        ŷ = F_k^hd(r; ω_k^hd)        loss = cross-entropy(ŷ, y)

One SGD step updates θ, ω_k and φ_k together, with learning rates η_θ, η_ω and η_φ. Only θ_k leaves the
client; the server sets θ^t = Σ_{k∈S^t} n_k θ_k / Σ_{k∈S^t} n_k.

Shared: θ, one float32 vector per client and round (CNN-5 without its head: 665,048 numbers, 2.66 MB).

Departures: the mean is normalised over the cohort (the paper prints the total over all clients, which would
shrink θ if C < 1). Steps are the configured SGD: momentum starts at zero in every client step, also for θ,
and the gradient is clipped by its joint norm over θ, ω_k and φ_k.

The gate's input is the raw sample. Token numbers carry no meaning, so for a text the input is the mean of
the shared extractor's embeddings of its n tokens, times √n (`models.text.pooled`). The gate sends no
gradient into the embeddings.

Two defaults are not the paper's literal reading, which `--preset paper` is. The gate begins with equal
weights for all samples (`gate.start` = even; the paper says nothing about first weights), and r is the
mixture times the number of experts (`mixture` = sum), so that equal weights add up the extractors and halve
no gradient. Both were chosen on validation rows, see jobs/tables/README.md.

Beyond the paper, off by default: several shared extractors, and the variants of the gate (`gate.*`) that the
paper leaves as open questions. With `unseen.private` = average,
clients also send gate and head (for the digits 70,094 and 5,010 numbers, upwards only). A client that never
trained then answers with their means, ŷ = head(Σ_i α_Gi r_Gi); it has no trained extractor of its own, so
α_F r_F is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pfedmoe_mpi.algorithms.base import Algorithm, Inputs, Mixture, Phase, Spec, Task
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Turn


class Options(Section):
    share: bool = True
    """If false, every client keeps a shared extractor of its own, and nothing is averaged (an ablation).
    Default: the method shares its extractor."""
    extractors: int = Field(1, ge=1)
    """Number m of shared extractors G_1..G_m; the gate weighs m + 1 experts. Default: the paper has one."""
    mixture: Literal["mean", "sum"] = "sum"
    """mean: the paper's r = Σ α_i r_i; sum: m + 1 times that, so that equal weights add up all extractors.
    With gate.routing = top1 both are the output of the one expert. Default: chosen on validation rows."""


class PFedMoE(Algorithm):
    averages_private = True
    gate_start = "even"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._names = ["shared", *(f"shared{number}" for number in range(2, self.options.extractors + 1))]
        self.experts = 1 + len(self._names)
        summed = self.options.mixture == "sum" and task.config.gate.routing == "soft"
        self.scale = self.experts if summed else 1
        self._averages = task.config.unseen.private == "average" and self.options.share

    def state(self) -> Spec:
        """Return θ, or θ_1..θ_m, and with unseen.private = average the mean gate and head."""
        means = {"mean_gate": self.task.gate(self.experts), "mean_head": self.task.head()}
        return {**self._theta(), **(means if self._averages else {})} if self.options.share else {}

    def client_state(self, client: int) -> Spec:
        """Return ω_k, the client's own model, and φ_k, its gate; without sharing also its own θ."""
        private = {
            "model": self.task.model(self.task.architecture(client)),
            "gate": self.task.gate(self.experts),
        }
        return private if self.options.share else {**self._theta(), **private}

    def _theta(self) -> Spec:
        """Return the shared extractors θ_1..θ_m."""
        return {name: self.task.extractor(self.task.shared) for name in self._names}

    def phases(self, role: str) -> list[Phase]:
        """Return one phase that trains θ, ω and φ together."""
        train = self.task.config.train
        shared = dict.fromkeys(self._names, train.lr_shared)
        return [self.phase({**shared, "model": train.lr, "gate": train.lr_gate})]

    def mixture(self, parts: Parts, inputs: Inputs) -> Callable[[Tensor], Mixture]:
        """Return the mixture of r_G1, …, r_Gm and r_F."""
        return partial(self._mixture, parts)

    def _mixture(self, parts: Parts, x: Tensor) -> Mixture:
        """Return (α_G1, …, α_Gm, α_F) of every sample, (B, m + 1), with what they weigh."""
        general = self._general(parts, x)

        def combine(r: Sequence[Tensor], alpha: Tensor) -> Tensor:
            mixed: Any = sum(a * g for a, g in zip(alpha.unsqueeze(2).unbind(1), r, strict=True))
            logits: Tensor = parts.model.head(self._scaled(mixed))
            return logits

        alpha = self._alpha(parts, x, general)
        return Mixture(alpha, lambda: [*general, parts.model.extractor(x)], combine, private=1)

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """Return ŷ (B, classes)."""
        return self._mixture(parts, x).answer()

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train and return θ_k; with unseen.private = average also φ_k and the head.

        A training client does not need the mean gate and head, so they do not count as sent to it.
        """
        values = dict(super().client_step(turn))
        if self._averages:
            parts, head = turn.parts, turn.parts.model.head
            values["mean_gate"] = parts.vector("gate")
            values["mean_head"] = torch.cat([head.weight.detach().reshape(-1), head.bias.detach()])
            turn.bytes_down = 4 * sum(values[name].numel() for name in self._names)
        return {name: value for name, value in values.items() if value.numel()}  # as in the default step

    def predictor(self, parts: Parts, inputs: Inputs, unseen: bool) -> Callable[[Tensor], Tensor] | None:
        """Return the whole mixture; for a client that never trained, the mean gate and head if available."""
        if unseen and self._averages:
            return partial(self._predict_unseen, parts)
        return super().predictor(parts, inputs, unseen)

    @property
    def no_answer_reason(self) -> str:
        """The default reason; empty with unseen.private = average."""
        return "" if self._averages else super().no_answer_reason

    def _predict_unseen(self, parts: Parts, x: Tensor) -> Tensor:
        """Return head(Σ_i α_Gi r_Gi) (B, classes), with the mean gate and head."""
        general = self._general(parts, x)
        alpha = parts.mean_gate(self._gate_input(parts, x, general))
        r = sum(alpha[:, i : i + 1] * g for i, g in enumerate(general))
        logits: Tensor = parts.mean_head(self._scaled(r))
        return logits

    def _scaled(self, r: Tensor) -> Tensor:
        """Return the mixture of softmax weights, times the number of experts with pfedmoe.mixture = sum."""
        return r * self.scale if self.scale > 1 else r

    @property
    def _gate_reads_shared(self) -> bool:
        """True for gate.input = shared."""
        return self.task.config.gate.input == "shared"

    def _general(self, parts: Parts, x: Tensor) -> list[Tensor]:
        """Return the shared representations r_G1, …, r_Gm, each (B, d)."""
        return [getattr(parts, name)(x) for name in self._names]

    def _alpha(self, parts: Parts, x: Tensor, general: list[Tensor]) -> Tensor:
        """Return the gate's weights (B, m + 1)."""
        alpha: Tensor = parts.gate(self._gate_input(parts, x, general))
        return alpha

    def _gate_input(self, parts: Parts, x: Tensor, general: list[Tensor]) -> Tensor:
        """Return the gate's input, which receives no gradient: x, or the first shared representation.

        For a text, x is replaced by the embeddings of the first shared extractor, see `Task.gate_input`.
        """
        return general[0].detach() if self._gate_reads_shared else self.task.gate_input(x, parts.shared)
