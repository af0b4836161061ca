"""BatchNorm's running statistics stay behind: only parameters are averaged.

Fails: moves
"""

from pfedmoe_mpi.algorithms.base import Block
from pfedmoe_mpi.algorithms.fedavg import FedAvg as Base


class ForgottenBuffers(Base):
    def parameters(self):
        return self.task.model(self.task.pool[0]).layout().parameters

    def payload(self, sizes):
        return {"model": Block(self.parameters())}

    def client_step(self, turn):
        super().client_step(turn)
        return {"model": turn.parts.parameter_vector("model")}

    def server_update(self, state, means, round):
        state["model"][: self.parameters()] = means["model"].value[0]
