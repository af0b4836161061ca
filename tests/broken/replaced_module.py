"""The shared module is replaced after its vector was bound, so what trains is not what is averaged.

Fails: moves
"""

import copy

from pfedmoe_mpi.algorithms.base import Algorithm


class ReplacedModule(Algorithm):
    def state(self):
        return {"model": self.task.model(self.task.shared)}

    def predict(self, parts, x):
        return self.trained(x)

    def client_step(self, turn):
        self.trained = copy.deepcopy(turn.parts.model)
        return super().client_step(turn)

    def phases(self, role):
        return [self.phase({"model": 0.01}, epochs=1)]
