"""FedRep: clients share the body and keep their heads; each round trains the head first, then the body.

Collins, Hassani, Mokhtari, Shakkottai: "Exploiting Shared Representations for Personalized Federated
Learning", ICML 2021, Algorithm 1. In round t client i receives the body φ^t, takes τ gradient steps on its
head h_i with φ^t fixed, then a step on the body with h_i fixed; the server averages the bodies.

Shared: φ, the extractor, one float32 vector per client and round; heads never leave their clients.

Departures: τ and the body's steps are counted in epochs, as in the paper's experiments. Bodies are averaged
by samples; Algorithm 1 averages without weights. While the head trains, the body is in evaluation mode, so
BatchNorm's running statistics do not change; while the body trains, they change and are averaged with it.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from pfedmoe_mpi.algorithms.base import Algorithm, Phase, Spec
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.parts import Parts


class Options(Section):
    head_epochs: int = Field(10, ge=0)
    """τ, epochs of the head with the body fixed, followed by `train.epochs` of the body.
    Default: the authors' experiments."""


class FedRep(Algorithm):
    homogeneous = True

    def state(self) -> Spec:
        """Return φ, the shared body."""
        return {"body": self.task.extractor(self.task.pool[0])}

    def client_state(self, client: int) -> Spec:
        """Return h_i, the client's head."""
        return {"head": self.task.head()}

    def phases(self, role: str) -> list[Phase]:
        """Return two phases: the head with the body fixed, then the body with the head fixed."""
        train = self.task.config.train
        head = self.phase({"head": train.lr}, epochs=self.options.head_epochs)
        return [head, self.phase({"body": train.lr_shared})]

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        logits: Tensor = parts.head(parts.body(x))
        return logits
