"""The training loss that a client reports is a private weight.

Fails: wire
"""

from pfedmoe_mpi.algorithms.fedavg import FedAvg as Base


class TalkingLoss(Base):
    def client_state(self, client):
        return {"gate": self.task.gate()}

    def client_step(self, turn):
        sent = super().client_step(turn)
        turn.measured_loss = float(turn.parts.vector("gate")[turn.round])
        return sent
