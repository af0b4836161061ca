"""Near: every client keeps a personal model close to the global one, as in Ditto, and both of them answer.

Written for these tests: Ditto's training, and the mean of the two models' logits as the answer.

Shared: the global model, one float32 vector per client and round.
"""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from pfedmoe_mpi.algorithms.base import Algorithm, Parts, Spec
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.turn import Turn


class Options(Section):
    weight: float = Field(0.1, ge=0)
    """λ, the weight of the distance to the global model. Default: for tests."""


class Near(Algorithm):
    homogeneous = True

    def state(self) -> Spec:
        """Return the global model."""
        return {"model": self.task.model(self.task.pool[0])}

    def client_state(self, client: int) -> Spec:
        """Return the personal model."""
        return {"personal": self.task.model(self.task.pool[0])}

    def initial(self, part: str, client: int) -> str:
        """Return that the personal model begins as the global one."""
        return "model"

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train both on one loss; the distance holds the personal model."""
        parts, train = turn.parts, self.task.config.train
        start = parts.parameter_vector("model").clone()

        def loss(batch: Batch) -> Tensor:
            own = torch.cat([p.view(-1) for p in parts.parameters("personal")])
            errors = [
                torch.nn.functional.cross_entropy(module(batch.x), batch.y)
                for module in (parts.personal, parts.model)
            ]
            return torch.stack(errors).sum() + self.options.weight * (own - start).square().sum()

        turn.sgd(self.phase({"personal": train.lr, "model": train.lr_shared}), loss)
        return {"model": parts.vector("model")}

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """Return the mean of both answers."""
        logits: Tensor = (parts.personal(x) + parts.model(x)) / 2
        return logits
