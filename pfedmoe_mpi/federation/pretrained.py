"""The files of `model.weights`: read on rank 0, checked against every architecture, and sent to all ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pfedmoe_mpi.checkpoint import Checkpoint, weights
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core.parts import Module, Spec
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models import names, pretrained
from pfedmoe_mpi.models.pretrained import Weights
from pfedmoe_mpi.mpi.comm import Comm

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # of a file's tensors by part and name


@dataclass(frozen=True)
class Pretrained:
    """The weights that modules begin with by architecture; `identity` and `lines` describe their files."""

    weights: Mapping[str, Weights] = field(default_factory=dict)
    identity: str = ""  # JSON: SHA-256 of the file by architecture; empty without files
    lines: tuple[str, ...] = ()


def load(comm: Comm, settings: Config, specs: Iterable[Spec], loaded: Checkpoint | None) -> Pretrained:
    """Return the weights of `model.weights`; with a checkpoint only their description; collective.

    Raises:
        ConfigError: on all ranks: a file is missing or does not fit its architecture, or no part uses it.
    """
    if loaded:
        return Pretrained(identity=loaded.identity.get("weights", ""))
    if not settings.model.weights and settings.model.train == "all":
        return Pretrained()
    modules = [part for spec in specs for part in spec.values() if isinstance(part, Module)]
    parts = {part.kind: part for part in modules if part.architecture}
    read: dict[str, Weights] = {}

    def facts() -> tuple[dict[str, tuple[Path, str, Shapes]], list[str]]:
        read.update(_read(settings, {part.architecture for part in parts.values()}))
        lines = [line for part in parts.values() for line in _line(part, read, settings.model.train)]
        return {name: (one.path, one.digest, _shapes(one)) for name, one in read.items()}, lines

    files, lines = comm.from_root(facts, "model.weights")
    sent: dict[str, Weights] = {}
    by_path: dict[Path, Weights] = {}
    for name, (path, digest, shapes) in files.items():
        if path not in by_path:
            by_path[path] = Weights(path, digest, _send(comm, shapes, read.get(name)))
        sent[name] = by_path[path]
    digests = {names.kind_of(name): one.digest for name, one in sent.items()}
    return Pretrained(sent, json.dumps(digests, sort_keys=True) if digests else "", tuple(lines))


def _read(settings: Config, used: set[str]) -> dict[str, Weights]:
    """Return the weights by architecture, of those that parts use."""
    by_architecture: dict[str, Weights] = {}
    items = [item.partition("=") for item in settings.model.weights]
    if len(items) > 1 and not all(equals for _, equals, _ in items):
        shown = ",".join(settings.model.weights)
        problem = f"model.weights = {shown}: of several files each needs the name of its architecture"
        raise ConfigError(problem, "--model.weights NAME=FILE,NAME=FILE, or one FILE for all")
    for before, equals, path in items:
        if not equals:
            weights_of_all = weights.read_all(Path(before))
            return dict.fromkeys(sorted(used), weights_of_all)
        name = _architecture(before, used)
        if name in by_architecture:
            raise ConfigError(f"model.weights names {before} twice", "remove one of them")
        by_architecture[name] = weights.read_all(Path(path))
    return by_architecture


def _architecture(text: str, used: set[str]) -> str:
    """Return the architecture in use that a name or a short name of one's own class means."""
    labels = dict(zip(names.labels(sorted(used)), sorted(used), strict=True))
    name = labels[text] if text in labels else names.resolve_name(text)
    if name not in used:
        listed = ", ".join(sorted(labels)) or "none"
        problem = f"model.weights names {text}, which is not an architecture of this run"
        raise ConfigError(problem, f"use one of {listed}; a FILE with = in its name needs NAME=FILE")
    return name


def _line(part: Module, read: Mapping[str, Weights], train: str) -> list[str]:
    """Return a line on a part's file, with what is drawn nevertheless, or on frozen tensors without one."""
    if part.architecture not in read:
        if train == "all":
            return []
        frozen = f"what model.train = {train} freezes stays so"
        return [f"weights: {part.kind} as it is built, from no file; {frozen}"]
    one = read[part.architecture]
    drawn = pretrained.match(part.skeleton(), one, part.kind).drawn
    return [f"weights: {part.kind} from {one.path}{', but drawn: ' if drawn else ''}{', '.join(drawn)}"]


def _shapes(one: Weights) -> Shapes:
    return {part: {k: tuple(t.shape) for k, t in tensors.items()} for part, tensors in one.parts.items()}


def _send(comm: Comm, shapes: Shapes, one: Weights | None) -> dict[str, dict[str, Tensor]]:
    """Return rank 0's tensors on all ranks, as views into one vector."""
    places = [(part, name, shape) for part, tensors in shapes.items() for name, shape in tensors.items()]
    sizes = [math.prod(shape) for _, _, shape in places]
    own = [one.parts[part][name].reshape(-1) for part, name, _ in places] if one else []
    vector = torch.cat(own) if own else torch.empty(sum(sizes))
    comm.broadcast(vector.numpy(), "model.weights")
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in shapes}
    for (part, name, shape), values in zip(places, vector.split(sizes), strict=True):
        parts[part][name] = values.view(shape)
    return parts
