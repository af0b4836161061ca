"""FedBN: FedAvg of everything but batch normalisation, which every client keeps to itself.

Li, Jiang, Zhang, Kamp, Dou: "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization",
ICLR 2021, Algorithm 1. Clients train their models as in FedAvg; for every layer that is not BatchNorm the
server averages the clients' values, and those of BatchNorm, its weights, biases and running statistics, stay.

Shared: the model without BatchNorm, one float32 vector per client and round. A model without such layers is
trained as by FedAvg.

Departures: a client's BatchNorm begins as that of w^0. Sums are over the cohort, by samples.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pfedmoe_mpi.algorithms.base import Algorithm, Block, Mean, Parts, Phase, Spec, Task, TensorPart
from pfedmoe_mpi.core.turn import Turn


class FedBN(Algorithm):
    homogeneous = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._model = task.model(task.pool[0])
        inside = {
            name for name, module in self._model.skeleton().named_modules() if isinstance(module, _BatchNorm)
        }
        layout = self._model.layout()
        own = torch.zeros(layout.size, dtype=torch.bool)
        for entry in layout.entries:
            own[entry.offset : entry.offset + entry.size] = entry.name.rpartition(".")[0] in inside
        self.kept_by_clients = {
            f"model/{e.name}" for e in layout.entries if e.name.rpartition(".")[0] in inside
        }
        self._own, self._shared = own.nonzero().view(-1), (~own).nonzero().view(-1)

    def state(self) -> Spec:
        """Return w, the global model; its BatchNorm stays as it began."""
        return {"model": self._model}

    def client_state(self, client: int) -> Spec:
        """Return the numbers of the client's BatchNorm, NaN before its first round."""
        return {"norms": TensorPart((len(self._own),), float("nan"))}

    def payload(self, sizes: Mapping[str, int]) -> Mapping[str, Block]:
        """Return the numbers outside of BatchNorm, weighted by n_k."""
        return {"model": Block(len(self._shared))}

    def phases(self, role: str) -> list[Phase]:
        return [self.phase({"model": self.task.config.train.lr_shared})]

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train w with the client's BatchNorm, and keep the latter."""
        for phase in self.phases(turn.role):
            turn.sgd(phase)
        vector = turn.parts.vector("model")
        turn.parts.norms.copy_(vector[self._own.to(vector.device)])
        turn.bytes_down = 4 * len(self._shared)
        return {"model": vector[self._shared.to(vector.device)]}

    def assemble(self, parts: Parts) -> None:
        """Put the client's BatchNorm into the model, if it has one of its own."""
        if not bool(parts.norms.isnan().any()):
            vector = parts.vector("model")
            vector[self._own.to(vector.device)] = parts.norms

    def server_update(self, state: Mapping[str, Tensor], means: Mapping[str, Mean], round: int) -> None:
        """Replace w outside of BatchNorm."""
        state["model"][self._shared] = means["model"].value[0]

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        logits: Tensor = parts.model(x)
        return logits

    @property
    def no_answer_reason(self) -> str:
        return "a client that never trained has no batch normalisation" if len(self._own) else ""
