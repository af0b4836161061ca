"""FedKD: a private mentor and a shared mentee teach each other; the mentee's updates travel as thin factors.

Wu, Wu, Lyu, Huang, Xie: "Communication-efficient federated learning via knowledge distillation", Nature
Communications 13, 2022. Mentor t (the client's own model) and mentee s (small, shared) have outputs y_t and
y_s, representations H_t and H_s of equal length, and a private linear map W_h (eqs. 1 to 7):

    L_t^t = CE(y, y_t)          L_s^t = CE(y, y_s)          D = L_t^t + L_s^t
    L_t = L_t^t + KL(y_s ‖ y_t) / D + L^h       L_s = L_s^t + KL(y_t ‖ y_s) / D + L^h
    L^h = MSE(H_t, W_h H_s) / D

The mentor descends ∂L_t/∂Θ_t, the mentee ∂L_s/∂Θ_s, W_h both. A client sends its mentee's update, each
matrix as U Σ V with the fewest singular values whose energy exceeds a share T (eq. 8):

    Σ_{i≤K} σ_i² / Σ_i σ_i² > T          T(t) = T_start + (T_end − T_start)·t, t from 0 to 1

The server rebuilds the updates, takes their mean, weighted by n_k, and decomposes it in the same way; server
and clients add the same U Σ V, so all hold the same mentee. A client answers with its mentor; one that never
trained answers with the mentee.

Shared: the mentee's update. The simulation sums it rebuilt; the bytes counted are those of the factors, K(P
+ Q + 1) numbers for a P×Q matrix, or of the matrix itself if that is less, and everything that is not a
matrix is counted whole. A client that trained in the round before receives the last global update, any other
client the whole mentee.

Departures: t is counted in `fedkd.ramp` rounds instead of the rounds of the run, so that a continued run
equals a longer one. A convolution's kernel is a matrix with one row per filter; a matrix that its factors
would not make smaller travels whole. No gradient flows from one model's loss into the other model (the
authors' code descends the sum of the losses, and leaves W_h, which is in eq. 5, out of it). KL is summed over
the classes and averaged over the batch (HtFLlib: averaged over the classes too). D is at least 10⁻⁶. There
are no attention maps and no encryption. BatchNorm's running statistics travel with the update. W_h has the
mentor's learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pfedmoe_mpi.algorithms.base import Algorithm, Block, Inputs, Mean, Module, Phase, Spec, Task, TensorPart
from pfedmoe_mpi.algorithms.fml import divergence
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Turn


class Options(Section):
    energy_start: float = Field(0.95, gt=0, le=1)
    """T_start, share of an update's energy that its factors keep in the first rounds; 1 = all of it.
    Default: the authors' code."""
    energy_end: float = Field(0.98, gt=0, le=1)
    """T_end, the share from round `ramp` on. Default: the authors' code."""
    ramp: int = Field(40, ge=1)
    """Rounds over which the share changes from T_start to T_end.
    Default: as `rounds`, so that the share changes over a whole default run."""


class FedKD(Algorithm):
    beyond_gradients = "the loss is divided by a batch's mean errors"
    no_answer_reason = ""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._mentee = task.model(task.shared)
        self._layout = self._mentee.layout()

    def state(self) -> Spec:
        """Return the mentee Θ_s, and how many numbers its last update took to send."""
        return {"shared": self._mentee, "sent": TensorPart((1,))}

    def client_state(self, client: int) -> Spec:
        """Return the mentor Θ_t, W_h (d, d), and the round in which the client last trained."""
        return {
            "model": self.task.model(self.task.architecture(client)),
            "map": Module("map", partial(torch.nn.Linear, self.task.dim, self.task.dim, bias=False)),
            "seen": TensorPart((1,), fill=-1),
        }

    def payload(self, sizes: Mapping[str, int]) -> Mapping[str, Block]:
        """Return the mentee's update, rebuilt from its factors, with weight n_k."""
        return {"shared": Block(sizes["shared"], update=True)}

    def phases(self, role: str) -> list[Phase]:
        """Return one phase that trains mentor, mentee and W_h together."""
        train = self.task.config.train
        return [self.phase({"shared": train.lr_shared, "model": train.lr, "map": train.lr})]

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        """Return the mentor's logits (B, classes)."""
        logits: Tensor = parts.model(x)
        return logits

    def predictor(self, parts: Parts, inputs: Inputs, unseen: bool) -> Callable[[Tensor], Tensor] | None:
        """Return the mentor; the mentee if the client never trained."""
        return parts.shared if unseen else super().predictor(parts, inputs, unseen)

    def loss(self, parts: Parts, batch: Batch) -> Tensor:
        """Return L_t + L_s; each treats the other model's outputs as constants."""
        h_t, h_s = parts.model.extractor(batch.x), parts.shared.extractor(batch.x)
        y_t, y_s = parts.model.head(h_t), parts.shared.head(h_s)
        task_t, task_s = functional.cross_entropy(y_t, batch.y), functional.cross_entropy(y_s, batch.y)
        to_t = divergence(y_s, y_t).mean() + functional.mse_loss(parts.map(h_s.detach()), h_t)
        to_s = divergence(y_t, y_s).mean() + functional.mse_loss(parts.map(h_s), h_t.detach())
        loss_t = task_t + to_t / (task_t + task_s.detach()).clamp(min=1e-6)
        loss_s = task_s + to_s / (task_t.detach() + task_s).clamp(min=1e-6)
        return loss_t + loss_s

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train, and return the mentee's update as rebuilt from its factors."""
        parts = turn.parts
        start = parts.vector("shared").clone()
        trained_last_round = int(parts.seen) == turn.round - 1
        turn.bytes_down = 4 * (int(parts.sent) if trained_last_round else self._layout.size)
        for phase in self.phases(turn.role):
            turn.sgd(phase)
        update, numbers = self._factor(parts.vector("shared") - start, turn.round)
        turn.bytes_up = 4 * numbers
        parts.seen.fill_(turn.round)
        return {"shared": update}

    def server_update(self, state: Mapping[str, Tensor], means: Mapping[str, Mean], round: int) -> None:
        """Add the mean update, as rebuilt from its factors."""
        update, numbers = self._factor(means["shared"].value[0], round)
        state["shared"] += update
        state["sent"].fill_(numbers)

    def _factor(self, update: Tensor, round: int) -> tuple[Tensor, int]:
        """Return the update (mentee,) as its receiver rebuilds it, on the CPU, and the numbers sent."""
        options = self.options
        share = min(1.0, round / options.ramp)
        energy = options.energy_start + (options.energy_end - options.energy_start) * share
        rebuilt = update.cpu().clone()
        numbers = 0
        for entry, tensor in zip(self._layout.entries, self._layout.views(rebuilt).values(), strict=True):
            factored = low_rank(tensor.flatten(1).clone(), energy) if len(entry.shape) > 1 else None
            if factored:
                tensor.copy_(factored[0].view(entry.shape))
            numbers += factored[1] if factored else entry.size
        return rebuilt, numbers


def low_rank(matrix: Tensor, energy: float) -> tuple[Tensor, int] | None:
    """Return U Σ V of a matrix (P, Q) with K singular values (eq. 8), and K(P + Q + 1), the numbers to send.

    None if that is not less than P·Q, or if the matrix is not finite, because it cannot be decomposed.
    """
    if not bool(matrix.isfinite().all()):
        return None
    u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
    energies = sigma.double().square().cumsum(0)
    rank = min(int((energies <= energy * energies[-1]).sum()) + 1, len(sigma))
    numbers = rank * (sum(matrix.shape) + 1)
    if numbers >= matrix.numel():
        return None
    return (u[:, :rank] * sigma[:rank]) @ v[:rank], numbers
