"""Private numbers are sent doubled and shifted within a block of zeros, so that no byte of them is unchanged.

Fails: wire
"""

import torch

from pfedmoe_mpi.algorithms.base import Block
from pfedmoe_mpi.algorithms.fedavg import FedAvg as Base


class ScaledPayload(Base):
    def client_state(self, client):
        return {"gate": self.task.gate()}

    def payload(self, sizes):
        return {**super().payload(sizes), "noise": Block(self.task.gate().layout().size + 50, weight="one")}

    def client_step(self, turn):
        sent, gate = super().client_step(turn), turn.parts.vector("gate")
        return {**sent, "noise": torch.cat([torch.zeros(20), 1.0 - 2.0 * gate, torch.zeros(30)])}

    def server_update(self, state, means, round):
        super().server_update(state, {"model": means["model"]}, round)
