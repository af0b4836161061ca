"""The server's optimiser (`server.optimiser`): how far the server follows the mean of the cohort.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan: "Adaptive Federated Optimization", ICLR 2021,
Algorithm 2 (FedAdam and FedYogi). The server's parameters x go out, client k returns x_k, and with p_k, its
weight in the method's mean,

    Δ = Σ_k p_k (x_k − x)
    m ← β1 m + (1 − β1) Δ
    adam:   v ← β2 v + (1 − β2) Δ²
    yogi:   v ← v − (1 − β2) Δ² sign(v − Δ²)
    x ← x + η m / (√v + τ)

from m = 0 and v = τ², the least that the paper allows; there is no bias correction, as in the paper. The
optimiser momentum is FedAvgM (Hsu, Qi, Brown: arXiv 1909.06335, 2019): m ← β m + Δ, x ← x + η m.

It moves parameters alone: BatchNorm's running statistics and plain tensors take the mean. Parameters to which
no member of the cohort contributed are unchanged, with their m and v.

Departure: Algorithm 2 weighs the cohort equally; p_k is what the method declares, n_k / Σ n_k for most.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pfedmoe_mpi.algorithms.base import Algorithm, Mean
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.config.sections import Server
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.errors import ConfigError

PIECE = 1 << 20  # values at a time, because the intermediate ones are float64


def check_method(settings: Config, method: Algorithm, layout: Layout) -> None:
    """Check that a server's optimiser can follow the mean that the server of a method takes.

    Args:
        layout: of the server's vector.

    Raises:
        ConfigError: there is no such mean of parameters, or clients do not start from it.
    """
    if settings.server.optimiser == "none":
        return
    name, averaged = settings.algorithm, _trained(layout, method.payload(layout.sizes)).values()
    problem, remedy = "", "remove --server.optimiser, or choose another --algorithm"
    if type(method).server_update is not Algorithm.server_update:
        problem = f"the server of {name} has an update of its own in place of a mean"
    elif not any(place.start < place.stop for place in averaged):
        problem = f"the server of {name} averages no parameters"
    elif settings.unseen.private == "average":
        problem = "unseen.private = average makes the server average parts that no client starts from"
        remedy = "remove --server.optimiser or --unseen.private"
    if problem:
        raise ConfigError(f"server.optimiser = {settings.server.optimiser}, but {problem}", remedy)


def _trained(layout: Layout, parts: Mapping[str, object]) -> dict[str, slice]:
    """Return where the parameters of these parts lie in the server's vector; a part's buffers follow them."""
    trained: dict[str, slice] = {}
    for name in parts:
        start = layout.parts[name].start if name in layout.parts else 0
        entries = (entry for entry in layout.entries if entry.trained and entry.name.startswith(f"{name}/"))
        trained[name] = slice(start, start + sum(entry.size for entry in entries))
    return trained


class ServerOptimiser:
    """The server's optimiser of a run.

    Every rank computes the same bits without sending any: each value is the result of single float64
    operations, which every processor rounds alike, rounded to float32 once.

    `moments`, float32 (Server.moments, size), are m and v after the last complete round.
    """

    def __init__(self, settings: Server, layout: Layout) -> None:
        self._settings = settings
        self._layout = layout
        self.moments = torch.zeros(settings.moments, layout.size)
        self.moments[1:] = settings.tau**2
        self._next = self.moments

    def load(self, moments: Tensor) -> None:
        """Continue with the moments of a checkpoint, (Server.moments · size,)."""
        self.moments = self._next = moments.view(self.moments.shape).clone()

    def update(self, before: Tensor, state: Tensor, means: Mapping[str, Mean]) -> None:
        """Replace the means of parameters in `state` by the optimiser's step; `commit` keeps the moments.

        Args:
            before: the server's vector that the cohort received, (size,).
            state: the vector with the means in it, (size,).
            means: which rows of which parts have one.
        """
        if not len(self.moments):
            return
        self._next = self.moments.clone()
        for name, place in _trained(self._layout, means).items():
            sent = (means[name].weight > 0).repeat_interleave(means[name].value.shape[1])
            for start in range(place.start, place.stop, PIECE):
                piece = slice(start, min(start + PIECE, place.stop))
                chosen = sent[piece.start - place.start : piece.stop - place.start]
                stepped, moments = self._step(before[piece], state[piece], self.moments[:, piece])
                state[piece] = torch.where(chosen, stepped, state[piece])
                self._next[:, piece] = torch.where(chosen, moments, self._next[:, piece])

    def commit(self) -> None:
        """Keep the moments of the last `update`: its round is complete."""
        self.moments = self._next

    def _step(self, before: Tensor, mean: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next parameters (n,) and moments (Server.moments, n), float32."""
        x, (m, *rest) = before.double(), moments.double()
        delta = mean.double() - x
        if self._settings.optimiser == "momentum":
            m = m * self._settings.momentum + delta
            return (x + m * self._settings.rate).float(), m.float().unsqueeze(0)
        (v,), (beta1, beta2) = rest, self._settings.betas
        square = delta * delta
        m = m * beta1 + delta * (1 - beta1)
        if self._settings.optimiser == "adam":
            v = v * beta2 + square * (1 - beta2)
        else:
            v = v - square * (1 - beta2) * torch.sign(v - square)
        step = m * self._settings.rate / (v.sqrt() + self._settings.tau)
        return (x + step).float(), torch.stack([m, v]).float()
