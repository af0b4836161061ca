"""FedSSA: clients average their heads class by class, and mix what they had with what they receive.

Yi, Yu, Shi, Wang, Liu, Cui, Li: "FedSSA: Semantic Similarity-based Aggregation for Efficient
Model-Heterogeneous Personalized Federated Learning", IJCAI 2024. A head's row φ_k^c, weights and bias of
class c, speaks for the class wherever it was learned. The server averages row c over the clients that hold c,

    φ^c = mean of φ_k^c,

and a client begins round t, for its classes, with its own row stabilised by the global one, then trains all:

    φ_k^c ← μ(t)·φ_k^c + φ^c,    μ(t) = μ_0·cos(π t / (2 T_stable)) for t ≤ T_stable, else 0,    t = 0, 1, …

Shared: one row of d + 1 numbers per class held, up and down, per client and round; extractors are private.

As in the authors' code: μ(t), the sum whose weights do not add up to 1 while it is positive, μ_0 and
T_stable, the mean without weights, a first global head that is drawn at random; rows of classes a client
lacks are its own. The answer is the model as its client trained it: it meets the new global rows when its
next turn begins.

Departure: the mean is over the cohort. The authors' code averages the last rows of all clients, also of those
that did not train in the round.
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
    """μ_0, how much of its own rows a client keeps in the first round."""
    stable_rounds: int = Field(2, ge=0)
    """T_stable, the rounds in which that falls to 0."""


class Rows(nn.Module):
    """A head as rows (classes, d + 1) of weights and bias; a buffer, because nobody trains it."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("rows", rows(head).detach().clone())


def rows(head: nn.Linear) -> Tensor:
    """(classes, d + 1)."""
    return torch.cat([head.weight, head.bias[:, None]], 1)


class FedSSA(Algorithm):
    def state(self) -> Spec:
        """φ, the global head."""
        return {"header": Module("rows", lambda: Rows(nn.Linear(self.task.dim, self.task.classes)))}

    def client_state(self, client: int) -> Spec:
        """The client's own model."""
        return {"model": self.task.model(self.task.architecture(client))}

    def payload(self, sizes: Mapping[str, int]) -> Mapping[str, Block]:
        """One row per class, every client that holds it with weight 1."""
        return {"header": Block(self.task.dim + 1, rows=self.task.classes, weight="class_one")}

    def phases(self, role: str) -> list[Phase]:
        return [self.phase({"model": self.task.config.train.lr})]

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        logits: Tensor = parts.model(x)
        return logits

    def mu(self, round: int) -> float:
        """μ of round 1, 2, …"""
        done, stable = round - 1, self.options.stable_rounds
        return float(self.options.mu * math.cos(math.pi * done / (2 * stable))) if done < stable else 0.0

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Mix the rows of the client's classes, train, and send them."""
        head, held = turn.parts.model.head, turn.labels.unique()
        turn.bytes_down = 4 * len(held) * (self.task.dim + 1)
        mixed = self.mu(turn.round) * rows(head)[held] + turn.parts.header.rows[held]
        with torch.no_grad():
            head.weight[held], head.bias[held] = mixed[:, :-1], mixed[:, -1]
        for phase in self.phases(turn.role):
            turn.sgd(phase)
        return {"header": rows(head)}
