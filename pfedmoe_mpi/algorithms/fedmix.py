"""FedMix: M shared experts and a shared gate over all of them, trained together by every client.

Reisser, Louizos, Gavves, Welling: "Federated Mixture of Experts", arXiv 2107.06724, 2021; here as the
baseline of FedJETs (Dun et al., arXiv 2306.08586), where every client gets all M experts (M = K = 2).
A client maximises the likelihood of the mixture over its samples,

    p(y | x) = Σ_m g_m(x; φ) softmax(W_m(x))_y        loss = −log p(y | x)

in one SGD step over W_1..W_M and φ together; the server averages all of them, weighted by samples.

Shared: M models and the gate, per client and round, each way.

Departures: in the paper a client trains a selection of the experts that suits it; as the baseline of FedJETs
every client trains all of them. The gate is one network, averaged like the experts. Its input is the raw
sample, because FedMix has no common expert whose embeddings it could use; `gate.*` sets its design.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from pfedmoe_mpi.algorithms.base import Algorithm, Inputs, Mixture, Phase, Spec, Task
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.errors import ConfigError

MIN_WEIGHT = 1e-30  # replaces weight 0 of an expert that top-1 routing leaves out: its logarithm is finite


class Options(Section):
    experts: int = Field(2, ge=2)
    """Number of experts M, all sent to every client. Default: FedJETs' comparison has M = K = 2."""


class FedMix(Algorithm):
    homogeneous = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if task.config.gate.input == "shared":
            raise ConfigError(
                "gate.input = shared, but fedmix has no shared representation", "use --gate.input raw"
            )
        self.experts = self.options.experts
        self._names = [f"expert{m}" for m in range(self.experts)]

    def state(self) -> Spec:
        """Return the experts W_1..W_M and the gate φ."""
        experts = {name: self.task.model(self.task.pool[0]) for name in self._names}
        return {**experts, "gate": self.task.gate(len(experts))}

    def phases(self, role: str) -> list[Phase]:
        """Return one phase that trains experts and gate together."""
        train = self.task.config.train
        return [self.phase({**dict.fromkeys(self._names, train.lr_shared), "gate": train.lr_gate})]

    def mixture(self, parts: Parts, inputs: Inputs) -> Callable[[Tensor], Mixture]:
        """Return the mixture of the experts' probabilities."""
        return partial(self._mixture, parts)

    def _mixture(self, parts: Parts, x: Tensor) -> Mixture:
        """Return g(x; φ), (B, M), with the experts."""
        weights: Tensor = parts.gate(self.task.gate_input(x, getattr(parts, self._names[0]).extractor))
        return Mixture(
            weights,
            lambda: [getattr(parts, name)(x).float().log_softmax(1) for name in self._names],
            combine,
        )

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """Return log p(y | x) (B, classes)."""
        return self._mixture(parts, x).answer()

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        """Return −log p(y | x), averaged over the batch."""
        return torch.nn.functional.nll_loss(self.predict(parts, batch.x), batch.y)


def combine(log_p: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return log Σ_m g_m p_m(y | x), (B, classes)."""
    return (torch.stack(list(log_p), 1) + weights.clamp_min(MIN_WEIGHT).log().unsqueeze(2)).logsumexp(1)
