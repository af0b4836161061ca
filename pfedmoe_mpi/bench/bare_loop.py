"""pFedMoE's clients in plain PyTorch: what a round costs without this program around it.

The reference of `bench round`. Every client holds ordinary modules, the same architectures with the same
first values; the loop takes the same batches, the same optimiser settings and the same two evaluations. There
is no sum, no flat vector, no communication, no look for a stop, no check of what came out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pfedmoe_mpi.core import batches, seeds
from pfedmoe_mpi.core.batches import Split
from pfedmoe_mpi.core.flat import Layout, float_buffers
from pfedmoe_mpi.core.parts import Module, Spec
from pfedmoe_mpi.core.sgd import learning_rate_factor
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.models.registry import Model


@dataclass(frozen=True)
class BareClient:
    """A client: its copy of the shared extractor, its own model, its gate and what that sees of x."""

    id: int
    shared: nn.Module
    model: Model
    gate: nn.Module
    seen: Callable[[Tensor, nn.Module], Tensor]
    splits: Mapping[str, Split]

    def modules(self) -> tuple[nn.Module, ...]:
        return self.shared, self.model, self.gate

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        alpha = self.gate(self.seen(x, self.shared))
        representation = alpha[:, :1] * self.shared(x) + alpha[:, 1:] * self.model.extractor(x)
        logits: Tensor = self.model.head(representation)
        return logits


class BareLoop:
    """This rank's clients of a federation of pFedMoE, as copies that share nothing with it."""

    def __init__(self, federation: Federation, state: Tensor) -> None:
        self._federation = federation
        self._train = federation.config.train
        self.seconds = {"train": 0.0, "evaluate": 0.0}  # of the last round
        self.clients = [
            BareClient(
                k,
                **_modules(federation, state, client.spec, client.vector),
                seen=federation.task.seen,
                splits=client.splits,
            )
            for k, client in federation.clients.items()
        ]

    def play(self, round: int) -> None:
        """Train and measure the clients, then measure all of them again, as a round does after its sum."""
        started = time.perf_counter()
        for client in self.clients:
            self.train(client, round)
            self.accuracy(client)
        trained = time.perf_counter()
        for client in self.clients:
            self.accuracy(client)
        self.seconds = {"train": trained - started, "evaluate": time.perf_counter() - trained}

    def train(self, client: BareClient, round: int) -> float:
        """E epochs of SGD; the mean training loss per sample of the last."""
        settings, engine = self._train, self._federation.engine
        rate = learning_rate_factor(settings.schedule, round, self._federation.config.rounds)
        for module in client.modules():
            module.train()
        rates = zip(client.modules(), (settings.lr_shared, settings.lr, settings.lr_gate), strict=True)
        groups: list[dict[str, Any]] = [
            {"params": [*module.parameters()], "lr": lr * rate} for module, lr in rates
        ]
        optimiser = torch.optim.SGD(
            groups, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True
        )
        parameters = [parameter for group in groups for parameter in group["params"]]
        generator = seeds.torch_generator(engine.seed, "batches", round, client.id)
        split = client.splits["train"]
        total = torch.zeros((), device=engine.device)
        for _ in range(settings.epochs):
            total.zero_()
            for batch in batches.epoch(split, settings.batch, engine.normalise, settings.augment, generator):
                optimiser.zero_grad()
                with engine.autocast():
                    loss = nn.functional.cross_entropy(client.predict(batch.x), batch.y)
                loss.backward()
                if settings.clip:
                    nn.utils.clip_grad_norm_(parameters, settings.clip)
                optimiser.step()
                total += loss.detach() * len(batch)
        return float(total) / len(split)

    @torch.no_grad()
    def accuracy(self, client: BareClient) -> float:
        """On the client's test samples."""
        engine = self._federation.engine
        split = client.splits["test"]
        for module in client.modules():
            module.eval()
        correct = torch.zeros((), dtype=torch.int64, device=engine.device)
        loss = torch.zeros((), device=engine.device)
        with engine.autocast():
            for batch in batches.batches(split, engine.evaluation_batch, engine.normalise):
                logits = client.predict(batch.x).float()
                correct += (logits.argmax(1) == batch.y).sum()
                loss += nn.functional.cross_entropy(logits, batch.y, reduction="sum")
        return int(correct) / max(1, len(split))


def _modules(federation: Federation, state: Tensor, spec: Spec, vector: Tensor) -> dict[str, Any]:
    """Newly built modules with the values of the server's and the client's vectors."""
    modules: dict[str, Any] = {}
    for declared, values in ((federation.method.state(), state), (spec, vector)):
        places = federation.workbench.layout(declared).parts
        for name, part in declared.items():
            assert isinstance(part, Module), f"{name} is not a module"
            modules[name] = _loaded(part.build(), values[places[name]]).to(federation.engine.device)
    return modules


@torch.no_grad()
def _loaded(module: nn.Module, vector: Tensor) -> nn.Module:
    tensors = {**dict(module.named_parameters()), **float_buffers(module)}
    for name, view in Layout.of(module).views(vector).items():
        tensors[name].copy_(view)
    return module
