"""The common expert: its architecture, its file, its training and its embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pfedmoe_mpi.algorithms.base import Module, Phase, ReadWeights, Task
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models import names, registry

PRETRAIN = "pretrain"
HDF5 = (".h5", ".hdf5")  # files of this program; other files were saved by torch
CHECKS = 10  # measurements of the accuracy per epoch


class Common:
    """The common expert W_c as configured; `part` is its module, `width` the length d of an embedding."""

    def __init__(self, task: Task, source: str, architecture: str) -> None:
        name = task.pool[0] if architecture == "auto" else names.resolve_name(architecture)
        self._path = None if source == PRETRAIN else Path(source).expanduser()
        saved_by_torch = self._path is not None and self._path.suffix not in HDF5
        self._published = saved_by_torch and name in names.TORCHVISION and architecture != "auto"
        self.name = name
        if self._published:
            self.part, self.width, self._last = _published_network(name, task.shape)
        else:
            sizes = (task.classes, task.dim, task.config.model.stem, task.vocabulary)
            registry.check_model(name, task.shape, *sizes)
            self.part, self.width = task.model(name, whole=True), task.dim

    def from_file(self, read: ReadWeights) -> Tensor | None:
        """Return its vector as read from its file; None without a file.

        Raises:
            ConfigError: the file is missing, or is not of this architecture for these data.
        """
        if self._path is None:
            return None
        tensors = read(self._path, ("common", "model"))
        if self._published:
            dropped = (f"{self._last}.", "aux", "AuxLogits.")
            tensors = {f"network.{name}": t for name, t in tensors.items() if not name.startswith(dropped)}
        layout = self.part.layout()
        problem = _mismatch(tensors, layout)
        if problem:
            raise ConfigError(
                f"fedjets.common = {self._path} does not hold {self.name} for these data: {problem}",
                "set --fedjets.common_model to the file's architecture (auto: the experts', --model.shared), "
                "or use --fedjets.common pretrain",
            )
        return torch.cat([tensors[entry.name].reshape(-1) for entry in layout.entries])

    def embed(self, parts: Parts, x: Tensor) -> Tensor:
        """Return the embeddings x̂ (B, d) of samples, float32, without a gradient."""
        with torch.no_grad():
            module = parts.common if self._published else parts.common.extractor
            embeddings: Tensor = module(x).float()
        return embeddings


def _mismatch(tensors: Mapping[str, Tensor], layout: Layout) -> str:
    """Return the first problem: a tensor missing, of another shape, not finite or unexpected; else empty."""
    for entry in layout.entries:
        tensor = tensors.get(entry.name)
        if tensor is None:
            return f"the tensor {entry.name} is missing"
        if tuple(tensor.shape) != entry.shape:
            return f"{entry.name} has shape {tuple(tensor.shape)}, expected {entry.shape}"
        if not bool(tensor.isfinite().all()):
            return f"{entry.name} is not finite"
    unexpected = sorted(tensors.keys() - {entry.name for entry in layout.entries})
    return f"the tensor {unexpected[0]} is not part of the architecture" if unexpected else ""


def _published_network(name: str, shape: tuple[int, ...]) -> tuple[Module, int, str]:
    """Return a torchvision network as published, the length of its embedding, and its last layer's name.

    Raises:
        ConfigError: the network cannot process samples of this shape.
    """
    from pfedmoe_mpi.models.backbones import Embedding

    try:
        with registry.Weightless():
            embedding = Embedding(name, shape)
    except (AssertionError, RuntimeError, ValueError) as error:
        problem = f"fedjets.common_model = {name} cannot process samples of shape {shape}: {error}"
        raise ConfigError(problem, "use --fedjets.common_model resnet18") from error
    return Module(f"published {name}", partial(Embedding, name, shape)), embedding.width, embedding.last


def train(turn: Turn, phase: Phase, target: float, batch: int) -> str:
    """Train until the accuracy on the reserved test rows reaches `target`; return a line about the result."""
    every = max(1, turn.samples // (batch * CHECKS))
    accuracy = _accuracy(turn)

    def enough(steps: int) -> bool:
        nonlocal accuracy
        if steps % every:
            return False
        accuracy = _accuracy(turn)
        turn.parts.common.train()
        return accuracy >= target

    def loss(batch: Batch) -> Tensor:
        return torch.nn.functional.cross_entropy(turn.parts.common(batch.x), batch.y)

    steps = turn.sgd(phase, loss, enough) if accuracy < target else 0
    accuracy = _accuracy(turn)
    turn.parts.common_accuracy.fill_(accuracy)
    missed = "" if accuracy >= target else f", below fedjets.common_target = {target:g}"
    return f"common expert: accuracy {100 * accuracy:.2f} % on reserved rows after {steps} steps{missed}"


def _accuracy(turn: Turn) -> float:
    """Return the share of correct answers on the reserved test rows."""
    correct = [turn.parts.common(batch.x).argmax(1) == batch.y for batch in turn.batches("test")]
    return float(torch.cat(correct).double().mean())
