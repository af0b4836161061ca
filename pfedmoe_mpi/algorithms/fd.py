"""FD, federated distillation: clients share their mean outputs per class and learn from those of the others.

Jeong, Oh, Kim, Park, Bennis, Kim: "Communication-Efficient On-Device Machine Learning: Federated Distillation
and Augmentation under Non-IID Private Data", arXiv 1811.11479, 2018, algorithm FD. While client k trains, it
adds up its output vectors (logits through softmax) by true class; F_k,c is their mean. The server averages
over the M clients that hold class c, and client k's teacher for c excludes its own contribution,

    F̂_k,c = (M·F̄_c − F_k,c) / (M − 1)        loss = cross-entropy(y) + γ·cross-entropy(F̂_k,y).

Shared: one vector of `classes` probabilities per class held, each way, per client and round.

Departures: M counts the cohort members that held the class when it was last averaged. A class to which no
other client contributed has no teacher, and its samples have no distillation loss. In a deployment the server
computes every client's teacher; here the client computes it from the mean, M and its own contribution, which
it keeps as sums and counts, and the bytes counted are those of a deployment. If the contribution in the mean
is not the one that the client keeps (because a later one was lost on the way), the class has no teacher until
it is averaged again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pfedmoe_mpi.algorithms._per_class import class_counts
from pfedmoe_mpi.algorithms.base import Algorithm, Block, Mean, Phase, Spec, Task, TensorPart
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.errors import ConfigError


class Options(Section):
    weight: float = Field(1.0, ge=0)
    """γ, weight of the cross-entropy to the teacher.
    Default: the value in HtFLlib; the paper was not available."""


class FD(Algorithm):
    beyond_gradients = "clients send mean outputs of their samples"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        steps = task.config.train.steps
        epoch = max(task.config.train.updates(task.samples(client)) for client in task.training)
        if 0 < steps < epoch:
            raise ConfigError(
                f"train.steps = {steps}, but fd sends a client's mean output of every class it holds, and an "
                f"epoch of its largest client has {epoch} updates",
                f"use --train.steps {epoch}, or --train.steps 0 to train by epochs",
            )

    def state(self) -> Spec:
        """Return F̄ (classes, classes), NaN if undefined, and the rounds that say which contributions it has.

        `members` is M by class, `summed` the round in which a class was last averaged, `heard` the round of
        each client's last contribution.
        """
        classes = self.task.classes
        return {
            "outputs": TensorPart((classes, classes), fill=float("nan")),
            "members": TensorPart((classes,)),
            "summed": TensorPart((classes,)),
            "heard": TensorPart((self.task.clients,)),
        }

    def client_state(self, client: int) -> Spec:
        """Return ω_k, the client's own model, and F_k as sums and counts, with their round as `stamp`."""
        classes = self.task.classes
        return {
            "model": self.task.model(self.task.architecture(client)),
            "sums": TensorPart((classes, classes)),
            "counts": TensorPart((classes,)),
            "stamp": TensorPart((1,)),
        }

    def payload(self, sizes: Mapping[str, int]) -> Mapping[str, Block]:
        """Return one row per class, weight 1 for every client that holds it, and the sender's number."""
        classes = self.task.classes
        return {
            "outputs": Block(classes, rows=classes, weight="class_one"),
            "sender": Block(1, weight="one", slot=True),
        }

    def phases(self, role: str) -> list[Phase]:
        return [self.phase({"model": self.task.config.train.lr})]

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        logits: Tensor = parts.model(x)
        return logits

    def teacher(self, parts: Parts, client: int) -> Tensor:
        """Return F̂_k (classes, classes), NaN in the row of a class without a teacher."""
        last = parts.heard[client]
        took_part = parts.summed == last  # classes that were averaged in this client's last round
        included = took_part & (parts.counts > 0)  # classes whose mean contains this client's outputs
        others = parts.members - included.float()
        contribution = torch.where(included[:, None], parts.sums / parts.counts[:, None], 0.0)
        mean = (parts.members[:, None] * parts.outputs - contribution) / others[:, None]
        defined = (others > 0) & (~took_part | (parts.stamp == last))
        return torch.where(defined[:, None], mean, float("nan"))

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train towards labels and teacher, and add up the outputs meanwhile."""
        parts, classes = turn.parts, self.task.classes
        teacher = self.teacher(parts, turn.client)
        sums, counts = torch.zeros_like(parts.sums), torch.zeros_like(parts.counts)

        def loss(batch: Batch) -> Tensor:
            logits = self.predict(parts, batch.x).float()
            sums.index_add_(0, batch.y, logits.detach().softmax(1))
            counts.add_(class_counts(batch.y, classes))
            target = teacher[batch.y]
            has_teacher = ~target.isnan().any(1)
            distance = -(target.nan_to_num() * logits.log_softmax(1)).sum(1)
            distillation = torch.where(has_teacher, distance, 0.0).mean()
            return functional.cross_entropy(logits, batch.y) + self.options.weight * distillation

        for phase in self.phases(turn.role):
            turn.sgd(phase, loss)
        parts.sums.copy_(sums)
        parts.counts.copy_(counts)
        parts.stamp.fill_(turn.round)
        has_samples = counts > 0
        turn.bytes_up = 4 * classes * int(has_samples.sum())
        turn.bytes_down = 4 * classes * int((has_samples & ~teacher.isnan().any(1)).sum())
        return {"outputs": sums / counts[:, None], "sender": torch.tensor([float(turn.client)])}

    def server_update(self, state: Mapping[str, Tensor], means: Mapping[str, Mean], round: int) -> None:
        """Set F̄ and M of the classes that were sent; the others do not change."""
        outputs, sender = means["outputs"], means["sender"]
        sent = outputs.weight > 0
        state["outputs"].view(outputs.value.shape)[sent] = outputs.value[sent]
        state["members"][sent] = outputs.weight[sent].float()
        state["summed"][sent] = round
        state["heard"][sender.value[sender.weight[:, 0] > 0].view(-1).long()] = round
