"""The common expert: its architecture, its file, its training, and the embeddings it gives."""

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
HDF5 = (".h5", ".hdf5")  # of this program; other files are torch's
CHECKS = 10  # looks at the accuracy in an epoch


class Common:
    """W_c as configured; `part` is its module, `width` the length d of an embedding."""

    def __init__(self, task: Task, source: str, architecture: str) -> None:
        name = task.pool[0] if architecture == "auto" else names.resolve_name(architecture)
        self._path = None if source == PRETRAIN else Path(source).expanduser()
        published = self._path is not None and self._path.suffix not in HDF5
        self._published = published and name in names.TORCHVISION and architecture != "auto"
        self.name = name
        if self._published:
            self.part, self.width, self._last = _published(name, task.shape)
        else:
            sizes = (task.classes, task.dim, task.config.model.stem, task.vocabulary)
            registry.check_model(name, task.shape, *sizes)
            self.part, self.width = task.model(name), task.dim

    def from_file(self, read: ReadWeights) -> Tensor | None:
        """Its vector, if a file gives it.

        Raises:
            ConfigError: no such file, or not of this architecture on these data.
        """
        if self._path is None:
            return None
        found = read(self._path, ("common", "model"))
        if self._published:
            dropped = (f"{self._last}.", "aux", "AuxLogits.")
            found = {f"network.{name}": t for name, t in found.items() if not name.startswith(dropped)}
        return _vector(
            self._path,
            found,
            self.part.layout(),
            f"{self.name} as these data need it",
            "name its architecture by --fedjets.common_model (auto: the experts', --model.shared), "
            "or --fedjets.common pretrain",
        )

    def embed(self, parts: Parts, x: Tensor) -> Tensor:
        """x̂ (B, d) of samples, float32, without a gradient."""
        with torch.no_grad():
            module = parts.common if self._published else parts.common.extractor
            embeddings: Tensor = module(x).float()
        return embeddings


def _vector(path: Path, found: Mapping[str, Tensor], layout: Layout, what: str, remedy: str) -> Tensor:
    """The tensors as the flat vector of a layout (size,).

    Raises:
        ConfigError: some are missing, too many, of another shape, or not finite; names the first.
    """
    problem = ""
    for entry in layout.entries:
        tensor = found.get(entry.name)
        if tensor is None:
            problem = f"it has no {entry.name}"
        elif tuple(tensor.shape) != entry.shape:
            problem = f"{entry.name} is {tuple(tensor.shape)}, not {entry.shape}"
        elif not bool(tensor.isfinite().all()):
            problem = f"{entry.name} is not finite"
        if problem:
            break
    extra = sorted(found.keys() - {entry.name for entry in layout.entries})
    if not problem and extra:
        problem = f"it has {extra[0]} too"
    if problem:
        raise ConfigError(f"{path} is not {what}: {problem}", remedy)
    return torch.cat([found[entry.name].reshape(-1) for entry in layout.entries])


def _published(name: str, shape: tuple[int, ...]) -> tuple[Module, int, str]:
    """A torchvision network as published, the length of its embedding, and the name of its last layer."""
    from pfedmoe_mpi.models.backbones import Embedding

    try:
        with registry.Weightless():
            embedding = Embedding(name, shape)
    except (AssertionError, RuntimeError, ValueError) as error:
        given = "x".join(map(str, shape))
        raise ConfigError(
            f"{name} cannot be the common expert for {given}: {error}", "use resnet18"
        ) from error
    return Module(f"published {name}", partial(Embedding, name, shape)), embedding.width, embedding.last


def too_many(experts: int, clients: int) -> ConfigError:
    return ConfigError(
        f"fedjets.experts is {experts}, and every expert needs an anchor, but {clients} clients train",
        f"--fedjets.experts {clients} or less, or more --clients",
    )


def trained(turn: Turn, phase: Phase, target: float, batch: int) -> str:
    """Train until the accuracy on the reserved test rows reaches `target`; the line that tells."""
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
    missed = "" if accuracy >= target else f", below fedjets.common_target {target:g}"
    return f"common expert: accuracy {100 * accuracy:.2f} % on reserved rows after {steps} steps{missed}"


def _accuracy(turn: Turn) -> float:
    """Share of right answers on the reserved test rows."""
    found = [turn.parts.common(batch.x).argmax(1) == batch.y for batch in turn.batches("test")]
    return float(torch.cat(found).double().mean())
