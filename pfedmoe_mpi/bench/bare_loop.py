"""pFedMoE's clients in plain PyTorch: the cost of a round without this program around it.

The reference of `bench round`. Every client has ordinary modules of the same architectures with the same
initial values; the loop uses the same batches, the same optimiser settings and the same two evaluations. It
has no sum, no flat vectors, no communication, no check for a stop and no check of the results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pfedmoe_mpi.algorithms.pfedmoe import PFedMoE
from pfedmoe_mpi.core import batches, seeds
from pfedmoe_mpi.core.batches import Split
from pfedmoe_mpi.core.flat import Layout, float_buffers
from pfedmoe_mpi.core.parts import Module, Spec
from pfedmoe_mpi.core.sgd import learning_rate_factor
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.models.registry import Model


@dataclass(frozen=True)
class BareClient:
    """A client: its copy of the shared extractor, its model, its gate, and the gate's view of x, `seen`.

    `scale`: factor on the mixture, see pfedmoe.mixture.
    """

    id: int
    shared: nn.Module
    model: Model
    gate: nn.Module
    seen: Callable[[Tensor, nn.Module], Tensor]
    splits: Mapping[str, Split]
    scale: int

    def modules(self) -> tuple[nn.Module, ...]:
        """Return the shared extractor, the model and the gate."""
        return self.shared, self.model, self.gate

    def predict(self, x: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        alpha = self.gate(self.seen(x, self.shared))
        representation = alpha[:, :1] * self.shared(x) + alpha[:, 1:] * self.model.extractor(x)
        logits: Tensor = self.model.head(self.scale * representation)
        return logits


class BareLoop:
    """This rank's clients of a pFedMoE federation, as copies that share no memory with it."""

    def __init__(self, federation: Federation, state: Tensor) -> None:
        self._federation = federation
        self._train = federation.config.train
        if self._train.steps or self._train.accumulate > 1:
            problem = "the plain loop trains whole epochs, with an update for every batch"
            raise ConfigError(problem, "remove --train.steps and --train.accumulate")
        self.seconds = {"train": 0.0, "evaluate": 0.0}  # of the last round
        method = federation.method
        assert isinstance(method, PFedMoE)
        self.clients = [
            BareClient(
                k,
                **_modules(federation, state, client.spec, client.vector),
                seen=federation.task.gate_input,
                splits=client.splits,
                scale=method.scale,
            )
            for k, client in federation.clients.items()
        ]

    def run_round(self, round: int) -> None:
        """Train and evaluate each client, then evaluate all again, as a round does after its sum."""
        started = time.perf_counter()
        for client in self.clients:
            self.train(client, round)
            self.accuracy(client)
        trained = time.perf_counter()
        for client in self.clients:
            self.accuracy(client)
        self.seconds = {"train": trained - started, "evaluate": time.perf_counter() - trained}

    def train(self, client: BareClient, round: int) -> float:
        """Run E epochs of the configured optimiser; return the mean training loss per sample of the last."""
        settings, engine = self._train, self._federation.engine
        rate = learning_rate_factor(settings, round, self._federation.config.rounds)
        for module in client.modules():
            module.train()
        rates = zip(client.modules(), (settings.lr_shared, settings.lr, settings.lr_gate), strict=True)
        groups: list[dict[str, Any]] = [
            {"params": [*module.parameters()], "lr": lr * rate} for module, lr in rates
        ]
        optimiser = self._optimiser(groups)
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

    def _optimiser(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return torch's own optimiser with the configured settings."""
        settings = self._train
        decay = settings.weight_decay
        if settings.optimiser == "sgd":
            return torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=decay, fused=True)
        kind = torch.optim.AdamW if settings.optimiser == "adamw" else torch.optim.Adam
        betas = (settings.betas[0], settings.betas[1])
        return kind(groups, betas=betas, eps=settings.eps, weight_decay=decay, fused=True)

    @torch.no_grad()
    def accuracy(self, client: BareClient) -> float:
        """Return the accuracy on the client's test samples."""
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
    """Build modules with the values of the server's and the client's vectors."""
    modules: dict[str, Any] = {}
    for parts, values in ((federation.method.state(), state), (spec, vector)):
        ranges = federation.workbench.layout(parts).parts
        for name, part in parts.items():
            assert isinstance(part, Module), f"{name} is not a module"
            modules[name] = _loaded(part.build(), values[ranges[name]]).to(federation.engine.device)
    return modules


@torch.no_grad()
def _loaded(module: nn.Module, vector: Tensor) -> nn.Module:
    """Return the module with the values of a flat vector."""
    tensors = {**dict(module.named_parameters()), **float_buffers(module)}
    for name, view in Layout.of(module).views(vector).items():
        tensors[name].copy_(view)
    return module
