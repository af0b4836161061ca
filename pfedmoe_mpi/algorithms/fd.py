"""FD, federated distillation: clients share their mean outputs per class, and each learns from the others'.

Jeong, Oh, Kim, Park, Bennis, Kim: "Communication-Efficient On-Device Machine Learning: Federated Distillation
and Augmentation under Non-IID Private Data", arXiv 1811.11479, 2018, its algorithm of FD. While client k
trains, it adds up its output vectors (logits through softmax) by true class: F_k,c is their mean. The server
averages over the M clients that hold class c, and client k's teacher for c leaves out its own part,

    F̂_k,c = (M·F̄_c − F_k,c) / (M − 1)        loss = cross-entropy(y) + γ·cross-entropy(F̂_k,y).

Shared: one vector of `classes` probabilities per class held, each way per client and round.

Departures: M counts those of the cohort that held the class when it was last summed. A class without another
client's part has no teacher, and its samples carry no distillation. A deployment's server makes every
client's teacher; here a client makes it from the mean, M, and its own part, which it keeps as sums and
counts, and the bytes are those of a deployment. If its own part in the mean is no longer the one it keeps
(its later one got lost on the way), the class has no teacher until the next sum.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pfedmoe_mpi.algorithms.base import Algorithm, Block, Mean, Phase, Spec, TensorPart
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Turn


class Options(Section):
    weight: float = Field(1.0, ge=0)
    """γ, weight of the cross-entropy to the teacher."""


class FD(Algorithm):
    def state(self) -> Spec:
        """F̄ (classes, classes), NaN if undefined; by class M and the round of its sum; by client its last."""
        classes = self.task.classes
        return {
            "outputs": TensorPart((classes, classes), fill=float("nan")),
            "members": TensorPart((classes,)),
            "summed": TensorPart((classes,)),
            "heard": TensorPart((self.task.clients,)),
        }

    def client_state(self, client: int) -> Spec:
        """ω_k, the client's own model; sums and counts of F_k and the round they are of."""
        classes = self.task.classes
        return {
            "model": self.task.model(self.task.architecture(client)),
            "sums": TensorPart((classes, classes)),
            "counts": TensorPart((classes,)),
            "stamp": TensorPart((1,)),
        }

    def payload(self, sizes: Mapping[str, int]) -> Mapping[str, Block]:
        """One row per class, every client that holds it with weight 1; and who sent it."""
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
        """F̂_k (classes, classes), NaN for a class without one."""
        last = parts.heard[client]
        theirs = parts.summed == last  # rows whose sum this client was in
        own = theirs & (parts.counts > 0)
        others = parts.members - own.float()
        part = torch.where(own[:, None], parts.sums / parts.counts[:, None], 0.0)
        mean = (parts.members[:, None] * parts.outputs - part) / others[:, None]
        known = (others > 0) & (~theirs | (parts.stamp == last))
        return torch.where(known[:, None], mean, float("nan"))

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train towards labels and teacher, adding up the outputs on the way."""
        parts, classes = turn.parts, self.task.classes
        teacher = self.teacher(parts, turn.client)
        sums, counts = torch.zeros_like(parts.sums), torch.zeros_like(parts.counts)

        def loss(batch: Batch) -> Tensor:
            logits = self.predict(parts, batch.x).float()
            sums.index_add_(0, batch.y, logits.detach().softmax(1))
            counts.add_(torch.bincount(batch.y, minlength=classes))
            target = teacher[batch.y]
            known = ~target.isnan().any(1)
            distance = -(target.nan_to_num() * logits.log_softmax(1)).sum(1)
            distilled = torch.where(known, distance, 0.0).mean()
            return functional.cross_entropy(logits, batch.y) + self.options.weight * distilled

        for phase in self.phases(turn.role):
            turn.sgd(phase, loss)
        parts.sums.copy_(sums)
        parts.counts.copy_(counts)
        parts.stamp.fill_(turn.round)
        held = counts > 0
        turn.bytes_up = 4 * classes * int(held.sum())
        turn.bytes_down = 4 * classes * int((held & ~teacher.isnan().any(1)).sum())
        return {"outputs": sums / counts[:, None], "sender": torch.tensor([float(turn.client)])}

    def server_update(self, state: Mapping[str, Tensor], means: Mapping[str, Mean], round: int) -> None:
        """F̄ and M of the classes that came; a class nobody sent keeps its own."""
        outputs, sender = means["outputs"], means["sender"]
        came = outputs.weight > 0
        state["outputs"].view(outputs.value.shape)[came] = outputs.value[came]
        state["members"][came] = outputs.weight[came].float()
        state["summed"][came] = round
        state["heard"][sender.value[sender.weight[:, 0] > 0].view(-1).long()] = round
