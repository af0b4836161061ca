"""FedPer: clients share the base layers and keep their personalisation layers; both are trained together.

Arivazhagan, Aggarwal, Singh, Choudhary: "Federated Learning with Personalization Layers", arXiv 1912.00818,
2019. Client j trains the base layers W_B and its personalisation layers W_Pj together by SGD, and returns its
W_Bj; the server sets W_B = Σ n_j W_Bj / Σ n_j.

Shared: W_B, the extractor, one float32 vector per client and round; heads never leave their clients.

Departures: the personalisation layers are the head alone, where the paper varies their number. Sums are over
the cohort. Momentum starts from zero in every client step.
"""

from __future__ import annotations

from torch import Tensor

from pfedmoe_mpi.algorithms.base import Algorithm, Parts, Phase, Spec


class FedPer(Algorithm):
    homogeneous = True

    def state(self) -> Spec:
        """Return W_B, the extractor."""
        return {"base": self.task.extractor(self.task.pool[0])}

    def client_state(self, client: int) -> Spec:
        """Return W_Pj, the client's head."""
        return {"head": self.task.head()}

    def phases(self, role: str) -> list[Phase]:
        """Return one phase that trains extractor and head together."""
        train = self.task.config.train
        return [self.phase({"base": train.lr_shared, "head": train.lr})]

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """Return the head's logits (B, classes)."""
        logits: Tensor = parts.head(parts.base(x))
        return logits
