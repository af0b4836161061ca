"""Momentum is kept from one client to the next, so a client's result depends on who trained before it.

Fails: ranks
"""

import torch

from pfedmoe_mpi.algorithms.fedavg import FedAvg as Base


class KeptMomentum(Base):
    def client_step(self, turn):
        start = turn.parts.vector("model").clone()
        sent = super().client_step(turn)
        kept = getattr(self, "kept", torch.zeros_like(start))
        self.kept = 0.9 * kept + (sent["model"] - start)
        return {"model": start + self.kept}
