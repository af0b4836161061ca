"""The method reaches the communicator through `poll` and sends a private vector with it.

Fails: wire
"""

from pfedmoe_mpi.algorithms.fedavg import FedAvg as Base


class SideChannel(Base):
    def client_state(self, client):
        return {"gate": self.task.gate()}

    def client_step(self, turn):
        sent = super().client_step(turn)
        turn._engine.poll.__self__.gather(turn.parts.vector("gate").tolist(), "private")
        return sent
