"""FedEM: every client's data are a mixture of M shared components, with weights that it finds by EM.

Marfoq, Neglia, Bellet, Kameni, Vidal: "Federated Multi-Task Learning under a Mixture of Distributions",
NeurIPS 2021, arXiv 2108.10252. Written from its abstract and the authors' code, without equation numbers.
ℓ is the cross-entropy and θ_m are the components' parameters. A client with weights π_t, at first 1/M each,
receives all θ_m and does

    E step  q_s(m) ∝ π_tm exp(−ℓ(h_θm(x_s), y_s))                        for each of its n_t samples s
    M step  π_tm = (1/n_t) Σ_s q_s(m)        θ_tm by SGD on (1/n_t) Σ_s q_s(m) ℓ(h_θm(x_s), y_s)

The server sets θ_m = Σ_t n_t θ_tm / Σ_t n_t. A client answers p(y | x) = Σ_m π_tm softmax(h_θm(x))_y.

A client that never trained answers with equal weights. `unseen.tune` finds its own: as many E steps on its
labelled samples, each followed by that of π_t; the components stay as they are.

Shared: all M components, one float32 vector each per client and round. π_t never leaves its client.

Departures: sums are over the cohort. The components train on the same batches, and their gradient is clipped
by its joint norm (the authors' code shuffles for each component and does not clip). Momentum starts at zero
in every client step. A new client's weights begin equal in every evaluation and take `unseen.tune` steps (the
authors' code: one step in each evaluation, from the weights of the one before).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pfedmoe_mpi.algorithms.base import Algorithm, Inputs, Mixture, Phase, Spec, Task, TensorPart
from pfedmoe_mpi.algorithms.fedmix import combine
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Turn


class Options(Section):
    components: int = Field(3, ge=2)
    """Number of components M, all sent to every client. Default: the authors' commands."""


class FedEM(Algorithm):
    beyond_gradients = "clients weigh their samples and components by the losses of all samples"
    homogeneous = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.experts = self.options.components
        self._names = [f"component{m}" for m in range(self.experts)]

    def state(self) -> Spec:
        """Return the components θ_1..θ_M."""
        return {name: self.task.model(self.task.pool[0]) for name in self._names}

    def client_state(self, client: int) -> Spec:
        """Return π_t, the client's weights of the components."""
        return {"weights": TensorPart((self.experts,), 1 / self.experts)}

    def phases(self, role: str) -> list[Phase]:
        """Return one phase that trains all components together."""
        return [self.phase(dict.fromkeys(self._names, self.task.config.train.lr_shared))]

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Do an E step and the M step."""
        q = self._expect(turn)

        def loss(batch: Batch) -> Tensor:
            return (q[batch.rows] * self._losses(turn.parts, batch)).sum(1).mean()

        for phase in self.phases(turn.role):
            turn.sgd(phase, loss)
        return {name: turn.parts.vector(name) for name in self._names}

    def tune(self, turn: Turn, phase: Phase) -> None:
        """Find π_t of a client that never trained, in as many steps as the phase has epochs."""
        for _ in range(phase.epochs):
            self._expect(turn)

    def _expect(self, turn: Turn) -> Tensor:
        """Return q (n_t, M) of the training samples, and set π_t to its mean."""
        losses = torch.cat([self._losses(turn.parts, batch) for batch in turn.training_batches()])
        q = (turn.parts.weights.log() - losses).softmax(1)
        turn.parts.weights.copy_(q.mean(0))
        return q

    def _losses(self, parts: Parts, batch: Batch) -> Tensor:
        """Return ℓ(h_θm(x_s), y_s), (B, M)."""
        logits = [getattr(parts, name)(batch.x).float() for name in self._names]
        return torch.stack([functional.cross_entropy(z, batch.y, reduction="none") for z in logits], 1)

    def mixture(self, parts: Parts, inputs: Inputs) -> Callable[[Tensor], Mixture]:
        """Return the mixture of the components' probabilities, with the same weights for every sample."""
        return partial(self._mixture, parts)

    def _mixture(self, parts: Parts, x: Tensor) -> Mixture:
        """Return π_t for each sample, (B, M), with the components."""
        weights = parts.weights.expand(len(x), self.experts)
        return Mixture(
            weights,
            lambda: [getattr(parts, name)(x).float().log_softmax(1) for name in self._names],
            combine,
        )

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """Return log p(y | x) (B, classes)."""
        return self._mixture(parts, x).answer()
