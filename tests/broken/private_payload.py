"""The client's own model leaves it, beside the shared extractor.

Fails: wire
"""

import torch

from pfedmoe_mpi.algorithms.base import Algorithm, Block


class PrivatePayload(Algorithm):
    def state(self):
        return {"everything": self.task.extractor(self.task.shared)}

    def client_state(self, client):
        return {"model": self.task.model(self.task.shared)}

    def payload(self, sizes):
        return {"everything": Block(sizes["everything"]), "more": Block(self.private_size(), weight="one")}

    def private_size(self):
        return sum(p.numel() for p in self.task.model(self.task.shared).build().parameters())

    def predict(self, parts, x):
        return parts.model.head(parts.everything(x) + parts.model.extractor(x))

    def client_step(self, turn):
        sent = dict(super().client_step(turn))
        return {**sent, "more": torch.clone(turn.parts.vector("model"))}

    def server_update(self, state, means, round):
        super().server_update(state, {"everything": means["everything"]}, round)
