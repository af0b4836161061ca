"""SCAFFOLD: control variates on server and clients correct the drift of local steps.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: "SCAFFOLD: Stochastic Controlled Averaging for Federated
Learning", ICML 2020, Algorithm 1. The local step is y ← y − η_l (g(y) − c_i + c) (line 10). The new control,
option II, is c_i⁺ = c_i − c + (x − y) / (K η_l) after K steps (line 12). The server sets x ← x + η_g mean(y
− x) and c ← c + |S|/N mean(c_i⁺ − c_i) (lines 16 and 17), unweighted over the cohort S of the N clients that
train.

Shared: Δy (the model with its buffers) and Δc (its parameters), two float32 vectors per client and round.

Departures: there is no momentum, because option II does not describe it; for the same reason other optimisers
than SGD are refused. The correction enters as the linear term ⟨c − c_i, y⟩ of the loss, whose gradient it is;
the joint norm is clipped with it. Weight decay is part of g. BatchNorm's running statistics have no control:
their mean difference is added like that of the parameters. With clients' differential privacy |S| is the
expected size of the cohort.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from pfedmoe_mpi.algorithms.base import Algorithm, Block, Mean, Phase, Spec, Task, TensorPart
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.errors import ConfigError


class Options(Section):
    lr_server: float = Field(1.0, gt=0)
    """η_g, the server's learning rate. Default: η_g of the paper's experiments."""


class Scaffold(Algorithm):
    homogeneous = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if not task.config.train.lr_shared:
            problem = "train.lr_shared = 0, but scaffold divides by it; a positive number is expected"
            raise ConfigError(problem, "use --train.lr_shared 0.05")
        if task.config.train.optimiser != "sgd":
            raise ConfigError(
                f"train.optimiser = {task.config.train.optimiser}, but scaffold computes mean gradients from "
                "how far a client step moves, which is right for SGD only",
                "use --train.optimiser sgd, or choose another --algorithm",
            )
        self._model = task.model(task.pool[0])
        self._parameters = self._model.layout().parameters

    def state(self) -> Spec:
        """Return x, the global model, and c, the server's control (parameters,)."""
        return {"model": self._model, "control": TensorPart((self._parameters,))}

    def client_state(self, client: int) -> Spec:
        """Return c_i, the client's control (parameters,)."""
        return {"own_control": TensorPart((self._parameters,))}

    def payload(self, sizes: Mapping[str, int]) -> Mapping[str, Block]:
        """Return Δy and Δc, every client with weight 1."""
        return {name: Block(size, weight="one", update=True) for name, size in sizes.items()}

    def phases(self, role: str) -> list[Phase]:
        return [self.phase({"model": self.task.config.train.lr_shared}, momentum=0.0)]

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        logits: Tensor = parts.model(x)
        return logits

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        """Return the cross-entropy plus ⟨c − c_i, y⟩, so that the gradient is g(y) − c_i + c."""
        correction = parts.control - parts.own_control
        parameters = parts.parameters("model")
        pieces = correction.split([p.numel() for p in parameters])
        drift = sum(torch.dot(piece, p.view(-1)) for piece, p in zip(pieces, parameters, strict=True))
        return super().loss(parts, batch) + drift

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train y, update c_i, and return Δy and Δc (lines 7 to 14)."""
        parts = turn.parts
        start = parts.vector("model").clone()
        (phase,) = self.phases(turn.role)
        steps = turn.sgd(phase)
        model_change = parts.vector("model") - start
        parameter_change = parts.parameter_vector("model") - start[: parts.control.numel()]
        lr = turn.rate * phase.lr["model"]
        control_change = -parts.control - parameter_change / (steps * lr)
        parts.own_control.add_(control_change)
        return {"model": model_change, "control": control_change}

    def server_update(self, state: Mapping[str, Tensor], means: Mapping[str, Mean], round: int) -> None:
        """Update x and c (lines 16 and 17)."""
        model, control = means["model"], means["control"]
        state["model"] += self.options.lr_server * model.value[0]
        state["control"] += float(control.weight) / len(self.task.training) * control.value[0]
