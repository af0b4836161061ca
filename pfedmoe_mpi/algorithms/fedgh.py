"""FedGH: the server trains one head for all on the clients' mean representations; extractors stay private.

Yi, Wang, Liu, Shi, Yu: "FedGH: Heterogeneous Federated Learning with Generalized Global Header", ACM MM
2023. A client puts the global head θ on its own extractor, trains both, and sends R̄_k,c, the mean
representation of every class c it holds. The server takes a gradient step on θ for each of them, θ ← θ − η
∇ℓ(H(θ; R̄_k,c), c), and sends θ back, which replaces the clients' heads.

Shared: up one vector of length d per class held, down the head, per client and round.

Departures: the authors' code applies the server's gradients with the optimiser of the client that trained
last, so its global head never changes; here it does. The received vectors are shuffled in each epoch (the
authors' code takes them client by client). More epochs, larger batches and a separate learning rate of the
server are options. Means are over all samples of a class after training, in evaluation mode (the authors'
code averages the means of batches, in training mode). The server's SGD is plain; its gradient is clipped by
`train.clip`.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pfedmoe_mpi.algorithms._per_class import class_means, collect_rows, train_on_server
from pfedmoe_mpi.algorithms.base import Algorithm, Block, Mean, Phase, Spec
from pfedmoe_mpi.config.sections import Section
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.sgd import learning_rate_factor
from pfedmoe_mpi.core.turn import Turn


class Options(Section):
    epochs: int = Field(1, ge=1)
    """The server's epochs over the received representations, per round.
    Default: the paper takes one step for each representation."""
    lr: float = Field(0.0, ge=0)
    """The server's learning rate. Default: 0 = `train.lr_shared`, with which the clients train the head."""
    batch: int = Field(1, ge=1)
    """The server's batch size. Default: the paper takes one step for each representation."""


class FedGH(Algorithm):
    beyond_gradients = "clients send mean representations of their samples"

    def state(self) -> Spec:
        """Return θ, the global head."""
        return {"head": self.task.head()}

    def client_state(self, client: int) -> Spec:
        """Return the client's extractor; its head is the global one at the start of every turn."""
        return {"extractor": self.task.extractor(self.task.architecture(client))}

    def payload(self, sizes: Mapping[str, int]) -> Mapping[str, Block]:
        """Return R̄_k, one row per class, as a slot for every member."""
        size, rows = self.task.dim, self.task.classes
        return {"means": Block(size, rows=rows, weight="class_samples", slot=True)}

    def phases(self, role: str) -> list[Phase]:
        """Return one phase that trains extractor and head together."""
        train = self.task.config.train
        return [self.phase({"head": train.lr_shared, "extractor": train.lr})]

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        logits: Tensor = parts.head(parts.extractor(x))
        return logits

    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train, then return the mean representation of every class."""
        for phase in self.phases(turn.role):
            turn.sgd(phase)
        return {"means": class_means(turn, self.task.classes, turn.parts.extractor)}

    def server_update(self, state: Mapping[str, Tensor], means: Mapping[str, Mean], round: int) -> None:
        """Train θ by SGD on the representations that the cohort sent."""

        def loss(head: nn.Module, rows: Tensor, labels: Tensor) -> Tensor:
            self.poll()
            return functional.cross_entropy(head(rows), labels)

        config, options = self.task.config, self.options
        lr = options.lr or config.train.lr_shared
        train_on_server(
            self.task.head(),
            state["head"],
            Phase({"server": lr}, options.epochs, 0.0, 0.0, config.train.clip),
            learning_rate_factor(config.train, round, config.rounds),
            collect_rows(means["means"]),
            options.batch,
            seeds.torch_generator(config.seed, "server", round),
            loss,
        )
