"""The server's update writes a private vector into the state, remembered from a client on the same rank.

Fails: wire
"""

from pfedmoe_mpi.algorithms.fedavg import FedAvg as Base


class RememberingServer(Base):
    def client_state(self, client):
        return {"gate": self.task.gate()}

    def client_step(self, turn):
        sent = super().client_step(turn)
        self.seen = 2 * turn.parts.vector("gate")[:100]
        return sent

    def server_update(self, state, means, round):
        super().server_update(state, means, round)
        state["model"][:100] += getattr(self, "seen", 0.0)
