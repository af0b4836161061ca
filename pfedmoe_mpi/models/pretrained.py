"""Weights of a file in place of a module's initial draw: which tensor of the file replaces which of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models import lora

EXTRACTOR, HEAD = "extractor.", "head."  # of `registry.Model`
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # torchvision's heads for training, which our networks lack
FIRST_PARTS = ("common", "model")  # looked for first in a file of several parts
MOST_NAMES = 8  # of tensors in a message


@dataclass(frozen=True)
class Weights:
    """The float tensors of a file by part and name; a file that is not of this program has one part, ""."""

    path: Path
    digest: str  # SHA-256 of the file, in hexadecimal
    parts: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Match:
    """For a module's tensors by name: those of the file, and the names of the last layers' that it lacks.

    Low-rank factors that the file lacks are in neither.
    """

    tensors: Mapping[str, Tensor]
    drawn: Sequence[str]


def fill(module: nn.Module, weights: Weights) -> None:
    """Copy a file's tensors into a module; its last layers keep their values where the file's do not fit.

    Raises:
        ConfigError: the file does not fit.
    """
    found, targets = match(module, weights).tensors, float_tensors(module)
    with torch.no_grad():
        for name, tensor in found.items():
            targets[name].copy_(tensor)


def match(module: nn.Module, weights: Weights, label: str = "this architecture") -> Match:
    """Return which tensors of a file replace which of a module's, which may be on the meta device.

    An extractor's names may begin with `extractor.` in the file or not. Of a file's parts the one is taken
    from which most tensors fit. The last layers may differ: the head, and the extractor's last one.

    Raises:
        ConfigError: another tensor is missing, not finite, of another shape, or not one of the module's.
    """
    wanted, last = float_tensors(module), last_layers(module)
    known = module.state_dict().keys()
    readings = (_parametrised(reading, wanted) for reading in _readings(weights))
    found = max(readings, key=lambda reading: _fitting(wanted, reading))
    fitting = {name: t for name, t in found.items() if name in wanted and t.shape == wanted[name].shape}
    drawn = [name for name in wanted if name not in fitting and not lora.is_factor(name)]
    other = [name for name in drawn if not name.startswith(last)]
    ignored = (HEAD, *AUXILIARY, *(EXTRACTOR + name for name in AUXILIARY))
    surplus = [name for name in found if name not in known and not name.startswith(ignored)]
    problems = {
        "missing": [name for name in other if name not in found],
        "of another shape": [
            f"{name} {_shape(found[name])}, expected {_shape(wanted[name])}"
            for name in other
            if name in found
        ],
        "not finite": [name for name, t in fitting.items() if not bool(t.isfinite().all())],
        "not part of it": surplus,
    }
    texts = [f"{kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if texts:
        problem = f"model.weights = {weights.path} does not fit {label}: {'; '.join(texts)}"
        raise ConfigError(problem, _remedy(other, found, wanted))
    return Match(fitting, drawn)


def _remedy(other: Sequence[str], found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Return what to do about tensors that are missing or have another shape."""
    if len(other) == 1 and other[0] in found:
        theirs, ours = found[other[0]].shape, wanted[other[0]].shape
        if len(theirs) == len(ours) == 4 and theirs[0] == ours[0] and theirs[2:] == ours[2:]:
            return f"use samples of {theirs[1]} channels, or weights for {ours[1]}"
        if other[0].endswith("conv1.weight"):
            return "ResNets as published: --model.stem imagenet; else use weights of this architecture"
    return "use weights of this architecture; a file for one of several: --model.weights NAME=FILE"


def float_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent float buffers, tied ones once."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


def last_layers(module: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the last layers' tensors: the head's, and those of the extractor's last one.

    The extractor's last layer is its attribute `last`, else its last linear or convolutional one.
    """
    head = getattr(module, "head", None)
    extractor = getattr(module, "extractor", None)
    is_model = isinstance(extractor, nn.Module) and isinstance(head, nn.Linear)
    body, prefix = (extractor, EXTRACTOR) if isinstance(extractor, nn.Module) and is_model else (module, "")
    layers = [name for name, part in body.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    last = "last" if isinstance(getattr(body, "last", None), nn.Linear) else (layers or [None])[-1]
    found = () if last is None else (f"{prefix}{last}." if last else prefix,)
    return (HEAD, *found) if is_model else found


def _readings(weights: Weights) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each part of a file, under every way in which their names may be meant."""
    parts = [name for name in FIRST_PARTS if name in weights.parts]
    for part in (*parts, *(name for name in weights.parts if name not in parts)):
        tensors = dict(weights.parts[part])
        yield tensors
        yield {EXTRACTOR + name: tensor for name, tensor in tensors.items()}
        inside = {k.removeprefix(EXTRACTOR): t for k, t in tensors.items() if k.startswith(EXTRACTOR)}
        yield {k: t for k, t in tensors.items() if not k.startswith((EXTRACTOR, HEAD))} | inside


def _parametrised(reading: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with those of low-rank layers under the names that these have in the module."""
    names = {lora.plain(name): name for name in wanted if not lora.is_factor(name)}
    return {name if name in wanted else names.get(name, name): t for name, t in reading.items()}


def _fitting(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return how many tensors have the name and shape of a wanted one, and how many its name."""
    named = [name for name in wanted if name in found]
    return sum(found[name].shape == wanted[name].shape for name in named), len(named)


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def _listed(names: Sequence[str]) -> str:
    more = f", … ({len(names)})" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
