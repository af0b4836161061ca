"""APFL: every client mixes the weights of a model of its own with those of the global one.

Deng, Kamani, Mahdavi: "Adaptive Personalized Federated Learning", arXiv 2003.13461, 2020, Algorithm 1. With
v̄_i = α_i v_i + (1 − α_i) w_i, every step of client i is

    w_i ← w_i − η ∇f_i(w_i; ξ)        v_i ← v_i − η ∇_v f_i(v̄_i; ξ) = v_i − η α_i ∇f_i(v̄_i; ξ)

on one batch ξ, both from the values before it; the server averages the w_i, without weights. The mixing
weight follows its own gradient, α_i ← α_i − η ⟨v_i − w_i, ∇f_i(v̄_i; ξ)⟩, in the first step of a round, and is
kept between 0 and 1. v̄_i answers.

Shared: w, the model, one float32 vector per client and round; v_i and α_i never leave their client.

Departures: v_i begins as w^0. After the round v̄_i is mixed with the new w. Running statistics of BatchNorm
are w's of w_i and v_i's of v̄_i; frozen tensors are not mixed. Both gradients count in one `train.clip`; with
`privacy.unit = sample` each has a norm of its own, because v_i's noise must not reach w_i.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call

from pfedmoe_mpi.algorithms.base import Algorithm, Block, Parts, Phase, Spec, Task, TensorPart
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.errors import ConfigError


class Options(Section):
    alpha: float = Field(0.5, ge=0, le=1)
    """α_i before round 1, the share of the client's own model.
    Default: our choice: both models count alike at first."""
    adaptive: bool = True
    """Learn α_i; false keeps it.
    Default: what gives the method its name."""


class APFL(Algorithm):
    homogeneous = True
    apart = ("personal",)

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if task.config.privacy.unit == "sample" and self.options.adaptive:
            problem = "privacy.unit = sample, but apfl.adaptive = true: α_i learns from a batch without noise"
            raise ConfigError(problem, "use --apfl.adaptive false")

    def state(self) -> Spec:
        """Return w, the global model."""
        return {"model": self.task.model(self.task.pool[0])}

    def client_state(self, client: int) -> Spec:
        """Return v_i, the client's own model, and α_i."""
        return {
            "personal": self.task.model(self.task.pool[0]),
            "alpha": TensorPart((1,), self.options.alpha),
        }

    def initial(self, part: str, client: int) -> str:
        """Return that v_i begins as w^0."""
        return "model" if part == "personal" else part

    def payload(self, sizes: Mapping[str, int]) -> Mapping[str, Block]:
        """Return w_i, every client with weight 1."""
        return {name: Block(size, weight="one") for name, size in sizes.items()}

    def phases(self, role: str) -> list[Phase]:
        """Return one phase that trains w_i and v_i together."""
        train = self.task.config.train
        return [self.phase({"model": train.lr_shared, "personal": train.lr})]

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train w_i and v_i, and α_i in the first step."""
        parts, (phase,) = turn.parts, self.phases(turn.role)
        alpha = parts.alpha.clone().requires_grad_(self.options.adaptive)

        def loss(batch: Batch) -> Tensor:
            own = torch.nn.functional.cross_entropy(self._mixture(parts, batch.x, alpha), batch.y)
            return own + torch.nn.functional.cross_entropy(parts.model(batch.x), batch.y)

        def follow(steps: int) -> bool:
            if alpha.grad is not None:
                parts.alpha.sub_(turn.rate * phase.lr["personal"] * alpha.grad).clamp_(0, 1)
                alpha.requires_grad_(False).copy_(parts.alpha)
                alpha.grad = None
            return False

        turn.sgd(phase, loss, enough=follow)
        return {"model": parts.vector("model")}

    def _mixture(self, parts: Parts, x: Tensor, alpha: Tensor) -> Tensor:
        """Return the logits of v̄_i; no gradient flows into w_i."""
        own = {id(v): w for v, w in zip(parts.parameters("personal"), parts.parameters("model"), strict=True)}
        mixed = {
            name: alpha * v + (1 - alpha) * own[id(v)].detach()
            for name, v in parts.personal.named_parameters()
            if id(v) in own
        }
        logits: Tensor = functional_call(parts.personal, mixed, (x,))
        return logits

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """Return what v̄_i predicts."""
        return self._mixture(parts, x, parts.alpha)
