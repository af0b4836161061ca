"""Ensemble: M independently seeded models, each trained by a part of the cohort; the answer is their average.

The baseline "average ensembles" of Dun et al.: "FedJETs: Efficient Just-In-Time Personalization with
Federated Mixture of Experts", arXiv 2306.08586, 2023. In every round the M models are assigned to the
cohort, as evenly as possible and drawn anew. Member k trains its model q by cross-entropy; the server sets
W_q = Σ_k n_k W_q^k / Σ_k n_k over the members that trained it, and a model that no member trained does not
change. The answer is p(y | x) = (1/M) Σ_q softmax(W_q(x))_y, also for clients that never trained.

Shared: one model per client and round, each way; a client needs all M models to answer.

Departures: the paper gives no procedure. Assigning one model to each member is our choice; it costs a client
as much as FedAvg.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from pfedmoe_mpi.algorithms.base import Algorithm, Phase, Spec, Task
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Turn


class Options(Section):
    models: int = Field(0, ge=0)
    """Number of models M; 0 chooses it. Default: 0 = 5, as many as FedJETs has experts, or one per training
    client if these are fewer."""


class Ensemble(Algorithm):
    homogeneous = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        number = self.options.models or min(5, len(task.training))
        self._names = [f"model{q}" for q in range(number)]

    def state(self) -> Spec:
        """Return the models W_1..W_M."""
        return {name: self.task.model(self.task.pool[0]) for name in self._names}

    def cohort(self, round: int) -> list[tuple[int, str]]:
        """Return the default cohort; a member's role is the name of its model."""
        members = self.draw_clients(round, self.task.training)
        order = seeds.numpy_generator(self.task.config.seed, "ensemble", round).permutation(len(members))
        return [(k, self._names[q % len(self._names)]) for k, q in zip(members, order, strict=True)]

    def phases(self, role: str) -> list[Phase]:
        """Return the phase of a member's model; of all models for the role of a client that is tuned."""
        names = [role] if role in self._names else self._names
        return [self.phase(dict.fromkeys(names, self.task.config.train.lr_shared))]

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train and return the member's model."""
        model = getattr(turn.parts, turn.role)
        (phase,) = self.phases(turn.role)
        turn.sgd(phase, loss=lambda batch: torch.nn.functional.cross_entropy(model(batch.x), batch.y))
        vector = turn.parts.vector(turn.role)
        turn.bytes_down = 4 * vector.numel()
        return {turn.role: vector}

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """Return log p(y | x) (B, classes)."""
        models = [getattr(parts, name)(x).float().log_softmax(1) for name in self._names]
        return torch.stack(models).logsumexp(0) - math.log(len(models))
