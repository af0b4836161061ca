"""FedAPEN: a private and a shared model teach each other, and a learned weight mixes their answers.

Qin, Deng, Zhao, Yan: "FedAPEN: Personalized Cross-silo Federated Learning with Adaptability to Statistical
Heterogeneity", KDD 2023. Written from the authors' released code, without equation numbers. z_p are the
logits of the client's own model, z_s those of its copy of the shared model, p_p and p_s their softmax, and
λ_k in [0, 1] is the client's ensemble weight, at first 0.5:

    learning for ensemble:     L_p = CE(z_p) + KL(p_s ‖ p_p) + CE(λ_k z_p + (1 − λ_k) z_s)
                               L_s = CE(z_s) + KL(p_p ‖ p_s) + CE(λ_k z_p + (1 − λ_k) z_s)
    learning for adaptability: λ_k ← clip(λ_k − η_λ ∂/∂λ_k CE(λ_k z_p + (1 − λ_k) z_s), 0, 1)

Each model descends its own loss, with the other model's output as a constant. λ_k is learned with the
averaged shared model, in several passes over a small share of the client's training samples that its models
never train on. The answer is softmax(λ_k z_p + (1 − λ_k) z_s); a client that never trained answers with the
shared model alone.

Shared: the shared model with its head, one float32 vector per client and round. λ_k stays on the client.

Departures: the mean is weighted by n_k (the authors' code: unweighted). λ_k is learned at the beginning of a
client step, from round 2 on, with the shared model as received. These are the same models as in the authors'
code, which learns λ_k right after the averaging; but a client evaluated after a round still has the λ_k from
the beginning of that round. Held-out rows stay in their batches, with weight 0 in the loss, so BatchNorm's
statistics include them; passes over them are not shuffled. Optimisers are as configured: momentum and the
joint clipping of both models' gradient are not in the authors' code; λ_k is trained by plain SGD, as there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pfedmoe_mpi.algorithms.base import Algorithm, Inputs, Phase, Spec, TensorPart
from pfedmoe_mpi.algorithms.fml import divergence
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Turn


class Options(Section):
    held_out: float = Field(0.05, gt=0, le=0.5)
    """Share of a client's training samples, at least one, that only its ensemble weight learns from.
    Default: the authors' code."""
    lr_weight: float = Field(0.001, ge=0)
    """η_λ, learning rate of the ensemble weight. Default: the authors' code."""
    passes: int = Field(10, ge=1)
    """Passes over the held-out samples per client step. Default: the authors' code."""


class FedAPEN(Algorithm):
    beyond_gradients = "the ensemble weight learns from held-out samples"
    no_answer_reason = ""

    def state(self) -> Spec:
        """Return the shared model."""
        return {"shared": self.task.model(self.task.shared)}

    def client_state(self, client: int) -> Spec:
        """Return the client's own model and λ_k, the weight of its logits."""
        model = self.task.model(self.task.architecture(client))
        return {"model": model, "weight": TensorPart((1,), fill=0.5)}

    def phases(self, role: str) -> list[Phase]:
        """Return one phase that trains both models together."""
        train = self.task.config.train
        return [self.phase({"shared": train.lr_shared, "model": train.lr})]

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """Return the ensemble's logits (B, classes)."""
        return mix(parts.weight, parts.model(x), parts.shared(x))

    def predictor(self, parts: Parts, inputs: Inputs, unseen: bool) -> Callable[[Tensor], Tensor] | None:
        """Return the ensemble; the shared model alone if the client never trained."""
        return parts.shared if unseen else super().predictor(parts, inputs, unseen)

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Learn λ_k with the shared model as received, then train both models with it."""
        held_out = self._held_out(turn)
        if turn.round > 1:
            self._learn_weight(turn, held_out)
        for phase in self.phases(turn.role):
            turn.sgd(phase, loss=lambda batch: self._loss(turn.parts, batch, ~held_out[batch.rows]))
        return {"shared": turn.parts.vector("shared")}

    def _held_out(self, turn: Turn) -> Tensor:
        """Return bool (n_k,), True for the held-out rows; equal in every round in which n_k is the same."""
        number = max(1, int(self.options.held_out * turn.samples + 0.5))
        generator = seeds.torch_generator(self.task.config.seed, "held out", 0, turn.client)
        held_out = torch.zeros(turn.samples, dtype=torch.bool)
        held_out[torch.randperm(turn.samples, generator=generator)[:number]] = True
        return held_out.to(turn.device)

    def _learn_weight(self, turn: Turn, held_out: Tensor) -> None:
        """Learn λ_k by SGD on the held-out rows, with both models fixed (learning for adaptability)."""
        parts, size = turn.parts, self.task.config.train.batch
        private, shared, y = [], [], []
        rows, seen, start = held_out.nonzero().view(-1), 0, 0
        numbers = rows.tolist()  # the only wait for the device
        for batch in turn.training_batches():
            before, start = start, start + len(batch)
            first, seen = seen, bisect_left(numbers, start)
            if seen > first:
                chosen = rows[first:seen] - before
                private.append(parts.model(batch.x[chosen]).float())
                shared.append(parts.shared(batch.x[chosen]).float())
                y.append(batch.y[chosen])
        batches = [torch.cat(tensors).split(size) for tensors in (private, shared, y)]
        weight = parts.weight.clone().requires_grad_()
        for _ in range(self.options.passes):
            for z_p, z_s, target in zip(*batches, strict=True):
                (slope,) = torch.autograd.grad(
                    functional.cross_entropy(mix(weight, z_p, z_s), target), weight
                )
                with torch.no_grad():
                    weight.sub_(turn.rate * self.options.lr_weight * slope).clamp_(0, 1)
        parts.weight.copy_(weight.detach())

    def _loss(self, parts: Parts, batch: Batch, trained: Tensor) -> Tensor:
        """Return L_p + L_s, averaged over the batch's rows for which `trained`, bool (B,), is True."""
        z_p, z_s = parts.model(batch.x), parts.shared(batch.x)
        mixed_p = mix(parts.weight, z_p, z_s.detach())
        mixed_s = mix(parts.weight, z_p.detach(), z_s)
        entropies = [
            functional.cross_entropy(z, batch.y, reduction="none") for z in (z_p, z_s, mixed_p, mixed_s)
        ]
        losses = torch.stack(entropies).sum(0) + divergence(z_s, z_p) + divergence(z_p, z_s)
        return torch.where(trained, losses, 0.0).sum() / trained.sum().clamp(min=1)


def mix(weight: Tensor, private: Tensor, shared: Tensor) -> Tensor:
    """Return λ z_p + (1 − λ) z_s, (B, classes)."""
    return weight * private + (1 - weight) * shared
