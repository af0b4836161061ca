"""One client with a shared and a private part, and turns of it, without a federation around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.config.sections import Train
from pfedmoe_mpi.core.batches import Normalise, Split
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.parts import Module, Parts, Spec, Workbench
from pfedmoe_mpi.core.parts import Tensor as TensorPart
from pfedmoe_mpi.core.sgd import Phase
from pfedmoe_mpi.core.turn import Engine, Turn

CPU = torch.device("cpu")


def body() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 5))


class Two(Algorithm):
    """A shared and a private part, one after the other."""

    def __init__(self, *phases: Phase) -> None:
        self._phases = list(phases)

    def state(self) -> Spec:
        return {"shared": Module("body", body)}

    def client_state(self, client: int) -> Spec:
        return {
            "own": Module("head", lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))),
            "count": TensorPart((2,)),
        }

    def phases(self, role: str) -> list[Phase]:
        return self._phases

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        logits: Tensor = parts.own(parts.shared(x))
        return logits


def phase(
    lr: Mapping[str, float],
    epochs: int = 1,
    momentum: float = 0.9,
    decay: float = 0.0,
    clip: float = 0.0,
    **others: Any,
) -> Phase:
    return Phase(lr, epochs, momentum, decay, clip, **others)


BOTH = {"shared": 0.1, "own": 0.03}
SPLIT = Split(torch.randn((25, 6), generator=torch.Generator().manual_seed(1)), torch.arange(25) % 3)


class Player:
    """One client, its vectors, and turns of it."""

    def __init__(
        self,
        *phases: Phase,
        poll: Callable[[], None] = lambda: None,
        rounds: int = 10,
        method: type[Two] = Two,
        **train: Any,
    ) -> None:
        self.method = method(*phases)
        self.bench = Workbench(4, CPU)
        settings = Train(**{"batch": 6, **train})
        self.engine = Engine(CPU, Normalise((), (), 1, CPU), settings, 7, 4, rounds, poll)
        self.state = self.bench.initial(self.method.state())
        spec = self.method.client_state(0)
        self.client = Client(
            0, spec, self.bench.initial(spec, 0), dict.fromkeys(("train", "test", "validation"), SPLIT)
        )

    def turn(self, round: int = 1) -> Turn:
        parts = self.bench.parts((self.method.state(), self.state), (self.client.spec, self.client.vector))
        return Turn(self.engine, self.method.loss, self.client, parts, round, "client")

    def step(self, round: int = 1) -> tuple[Turn, Tensor, Tensor]:
        """Return (turn, shared vector, private vector) after a client step."""
        turn = self.turn(round)
        self.method.client_step(turn)
        turn.parts.check()
        private = self.bench.read(self.client.spec, turn.parts, torch.empty_like(self.client.vector))
        return turn, turn.parts.vector("shared").clone(), private
