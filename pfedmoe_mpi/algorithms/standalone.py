"""Standalone: every client trains its own model on its own data; nothing is shared.

The baseline of every table in arXiv 2402.01350. Each step is ω_k ← ω_k − η ∇ cross-entropy(F_k(x; ω_k), y).

Shared: nothing, 0 bytes.
"""

from __future__ import annotations

from torch import Tensor

from pfedmoe_mpi.algorithms.base import Algorithm, Spec
from pfedmoe_mpi.core.parts import Parts


class Standalone(Algorithm):
    def client_state(self, client: int) -> Spec:
        """Return ω_k, the client's own model."""
        return {"model": self.task.model(self.task.architecture(client))}

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        logits: Tensor = parts.model(x)
        return logits
