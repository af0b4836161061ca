"""FedSSA: clients average their heads class by class, and mix their own rows with the averaged ones.

Yi, Yu, Shi, Wang, Liu, Cui, Li: "FedSSA: Semantic Similarity-based Aggregation for Efficient
Model-Heterogeneous Personalized Federated Learning", IJCAI 2024. A head's row φ_k^c, weights and bias of
class c, stands for the class on every client that learned it. The server averages row c over the clients
that hold c,

    φ^c = mean of φ_k^c,

and a client begins round t by mixing, for its classes, its own row with the global one; then it trains the
whole model:

    φ_k^c ← μ(t)·φ_k^c + φ^c,    μ(t) = μ_0·cos(π t / (2 T_stable)) for t ≤ T_stable, else 0,    t = 0, 1, …

Shared: one row of d + 1 numbers per class held, up and down, per client and round; extractors are private.

As in the authors' code: μ(t); the sum, whose weights do not add up to 1 while μ(t) is positive; μ_0 and
T_stable; the mean without weights; a random first global head; rows of classes that a client lacks stay its
own. A client answers with its model as it trained it; the new global rows enter at the beginning of its next
turn.

Departures: the mean is over the cohort. The authors' code averages the last rows of all clients, including
those that did not train in the round; and a client's first model there is a reference to that of its
architecture, which clients before it may have trained in the same round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from pfedmoe_mpi.algorithms.base import Algorithm, Block, Module, Phase, Spec
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Turn


class Options(Section):
    mu: float = Field(0.5, ge=0)
    """μ_0, weight of a client's own rows in the first round. Default: μ_0 of the authors' code."""
    stable_rounds: int = Field(2, ge=0)
    """T_stable, rounds after which that weight is 0. Default: the authors' code."""


class Rows(nn.Module):
    """A head as rows (classes, d + 1) of weights and bias; a buffer, because it is not trained."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("rows", rows(head).detach().clone())


def rows(head: nn.Linear) -> Tensor:
    """Return weights and bias of a head, (classes, d + 1)."""
    return torch.cat([head.weight, head.bias[:, None]], 1)


class FedSSA(Algorithm):
    beyond_gradients = "clients tell which classes they hold"

    def state(self) -> Spec:
        """Return φ, the global head."""
        return {"header": Module("rows", lambda: Rows(nn.Linear(self.task.dim, self.task.classes)))}

    def client_state(self, client: int) -> Spec:
        """Return the client's own model."""
        return {"model": self.task.model(self.task.architecture(client))}

    def payload(self, sizes: Mapping[str, int]) -> Mapping[str, Block]:
        """Return one row per class, with weight 1 for every client that holds it."""
        return {"header": Block(self.task.dim + 1, rows=self.task.classes, weight="class_one")}

    def phases(self, role: str) -> list[Phase]:
        return [self.phase({"model": self.task.config.train.lr})]

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        logits: Tensor = parts.model(x)
        return logits

    def mu(self, round: int) -> float:
        """Return μ(t) in round t + 1 = 1, 2, …"""
        t, stable = round - 1, self.options.stable_rounds
        return float(self.options.mu * math.cos(math.pi * t / (2 * stable))) if t < stable else 0.0

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Mix the rows of the client's classes, train, and return all rows; other classes have weight 0."""
        head, classes = turn.parts.model.head, turn.labels.unique()
        turn.bytes_down = 4 * len(classes) * (self.task.dim + 1)
        mixed = self.mu(turn.round) * rows(head)[classes] + turn.parts.header.rows[classes]
        with torch.no_grad():
            head.weight[classes], head.bias[classes] = mixed[:, :-1], mixed[:, -1]
        for phase in self.phases(turn.role):
            turn.sgd(phase)
        return {"header": rows(head)}
