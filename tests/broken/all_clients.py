"""The sum over the cohort is divided by the samples of all clients, so the shared model shrinks when C < 1.

Fails: fixpoint
"""

from pfedmoe_mpi.algorithms.fedavg import FedAvg as Base


class AllClients(Base):
    def server_update(self, state, means, round):
        everybody = sum(self.task.samples(k) for k in range(self.task.clients))
        state["model"][:] = means["model"].value[0] * (int(means["model"].weight) / everybody)
