"""LG-FedAvg: clients keep extractors of any architecture and average the head.

Liang, Liu, Liu, Allen, Auerbach, Brent, Salakhutdinov, Morency: "Think Locally, Act Globally: Federated
Learning with Local and Global Representations", arXiv 2001.01523, 2020. Client m's model is the global part
θ^g on its local representation θ_m^l; both are trained together on its data, and the server sets θ^g = Σ N_m
θ_m^g / Σ N_m.

Shared: the head, one float32 vector per client and round (500 numbers to 10 classes: 5,010, 20 kB).

Departures: N sums over the cohort. The global part is the head alone, because that is what models of
different architectures have in common. The paper's optional losses on the local representations
(self-supervised, adversarial) and its start from a federated model are left out; the objective is
cross-entropy.
"""

from __future__ import annotations

from torch import Tensor

from pfedmoe_mpi.algorithms.base import Algorithm, Phase, Spec
from pfedmoe_mpi.core.parts import Parts


class LGFedAvg(Algorithm):
    def state(self) -> Spec:
        """Return θ^g, the global head."""
        return {"head": self.task.head()}

    def client_state(self, client: int) -> Spec:
        """Return θ_m^l, the client's extractor."""
        return {"extractor": self.task.extractor(self.task.architecture(client))}

    def phases(self, role: str) -> list[Phase]:
        """Return one phase that trains head and extractor together."""
        train = self.task.config.train
        return [self.phase({"head": train.lr_shared, "extractor": train.lr})]

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        logits: Tensor = parts.head(parts.extractor(x))
        return logits
