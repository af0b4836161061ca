"""Whoever reads this learns neither a source nor what leaves a client.

Fails: documented
"""

from pfedmoe_mpi.algorithms.fedavg import FedAvg as Base


class Undocumented(Base):
    pass
