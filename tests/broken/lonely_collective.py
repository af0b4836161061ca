"""Only ranks with clients call a collective, so the others never enter it.

Fails: idle
"""

from pfedmoe_mpi.algorithms.fedavg import FedAvg as Base


class LonelyCollective(Base):
    def client_step(self, turn):
        from mpi4py import MPI

        request = MPI.COMM_WORLD.Ibarrier()
        while not request.Test():
            turn._engine.poll()
        return super().client_step(turn)
