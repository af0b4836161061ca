"""FML: a private model and a shared "meme" model teach each other on every client.

Shen, Zhang, Jia, Zhang, Huang, Zhou, Kuang, Wu, Wu: "Federated Mutual Learning", arXiv 2006.16765, 2020. The
paper's two local objectives, with the outputs p_l of the client's own model and p_m of the meme model:

    L_local = α·CE(p_l, y) + (1 − α)·KL(p_m ‖ p_l)        L_meme = β·CE(p_m, y) + (1 − β)·KL(p_l ‖ p_m)

Each model descends its own objective, with the other model's output as a constant, both in one step. The
global model is the mean of the meme models. A client answers with its own model; one that takes no part
in training answers with the global model.

Shared: the meme model with its head, one float32 vector per client and round.

Departures: the mean is weighted by n_k (the authors' code: unweighted). KL is summed over the classes and
averaged over the batch, as in the paper and its authors' code (`batchmean`); HtFLlib and PFLlib average over
the classes too, which divides it by their number. The gradient is clipped by its joint norm over both models;
the momentum of both starts at zero in every client step (the authors' code: only that of the meme model).
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pfedmoe_mpi.algorithms.base import Algorithm, Inputs, Phase, Spec
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts


class Options(Section):
    alpha: float = Field(0.5, ge=0, le=1)
    """α, share of the cross-entropy in the private model's loss; the rest is distillation.
    Default: the authors' code."""
    beta: float = Field(0.5, ge=0, le=1)
    """β, share of the cross-entropy in the shared model's loss. Default: the authors' code."""


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(softmax(teacher) ‖ softmax(student)) of every sample (B,); no gradient to the teacher."""
    log_p, log_q = functional.log_softmax(teacher.detach(), 1), functional.log_softmax(student, 1)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


class FML(Algorithm):
    no_answer_reason = ""

    def state(self) -> Spec:
        """Return the meme model."""
        return {"shared": self.task.model(self.task.shared)}

    def client_state(self, client: int) -> Spec:
        """Return the client's own model."""
        return {"model": self.task.model(self.task.architecture(client))}

    def phases(self, role: str) -> list[Phase]:
        """Return one phase that trains both models together."""
        train = self.task.config.train
        return [self.phase({"shared": train.lr_shared, "model": train.lr})]

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        logits: Tensor = parts.model(x)
        return logits

    def predictor(self, parts: Parts, inputs: Inputs, unseen: bool) -> Callable[[Tensor], Tensor] | None:
        """Return the client's own model; the global model if the client never trained."""
        return parts.shared if unseen else super().predictor(parts, inputs, unseen)

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        """Return L_local + L_meme; no parameter receives a gradient from both."""
        local, meme = parts.model(batch.x), parts.shared(batch.x)
        alpha, beta = self.options.alpha, self.options.beta
        private = alpha * functional.cross_entropy(local, batch.y)
        shared = beta * functional.cross_entropy(meme, batch.y)
        private = private + (1 - alpha) * divergence(meme, local).mean()
        return private + shared + (1 - beta) * divergence(local, meme).mean()
