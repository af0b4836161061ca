"""A draw comes from a generator that no address seeds.

Fails: ranks
"""

import random

from pfedmoe_mpi.algorithms.fedavg import FedAvg as Base

ENTROPY = random.SystemRandom()


class Unseeded(Base):
    def loss(self, parts, batch):
        return super().loss(parts, batch) * (1 + 0.01 * ENTROPY.random())
