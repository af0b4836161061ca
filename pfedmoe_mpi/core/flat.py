"""Flat vectors: the layout of tensors in a vector, and modules whose tensors are views into one vector.

A `Layout` names the slices of a contiguous float32 vector: parameters first, float buffers last. A `Bound` is
a module whose parameters and buffers are views into one vector, so that loading a client is a single copy.
Moving or deep-copying a bound module would break its views: move first, bind last, then check the binding.

Frozen tensors are in a second vector, which all modules of an architecture share: the parameters that require
no gradient when the module is built, and the buffers of modules whose parameters are all frozen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256

import torch
from torch import Tensor, nn

from pfedmoe_mpi.models import deterministic


@dataclass(frozen=True)
class Entry:
    """One tensor inside a vector; `trained` is False for buffers and plain tensors."""

    name: str
    shape: tuple[int, ...]
    offset: int
    trained: bool

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The tensors of a vector, in order and without gaps."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, module: nn.Module, frozen: bool = False) -> Layout:
        """Return the layout of a module's vector, or of its frozen one: parameters, then float buffers.

        Tied weights appear once; integer buffers and those that are not persistent are in neither vector.
        """
        entries: list[Entry] = []
        offset = 0
        for name, tensor in tensors(module, frozen).items():
            assert tensor.dtype == torch.float32, f"{name} is {tensor.dtype}; a vector holds float32"
            trained = isinstance(tensor, nn.Parameter) and not frozen
            entries.append(Entry(name, tuple(tensor.shape), offset, trained))
            offset += tensor.numel()
        return cls(tuple(entries))

    @classmethod
    def of_tensor(cls, shape: tuple[int, ...]) -> Layout:
        """Return the layout of a plain tensor, which is the whole vector."""
        return cls((Entry("", shape, 0, False),))

    @classmethod
    def join(cls, parts: Mapping[str, Layout]) -> Layout:
        """Return the layout of the parts one after the other; an entry's name becomes `part/name`."""
        entries: list[Entry] = []
        offset = 0
        for part, layout in parts.items():
            assert "/" not in part, f"'{part}' cannot name a part: it contains '/'"
            entries += [replace(e, name=f"{part}/{e.name}", offset=e.offset + offset) for e in layout.entries]
            offset += layout.size
        return cls(tuple(entries))

    def part(self, name: str) -> Layout:
        """Return the layout of one part of a joined layout; empty if it has no values."""
        start, before = self.parts.get(name, slice(0, 0)).start, f"{name}/"
        inside = (entry for entry in self.entries if entry.name.startswith(before))
        return Layout(
            tuple(replace(e, name=e.name.removeprefix(before), offset=e.offset - start) for e in inside)
        )

    @property
    def size(self) -> int:
        """Length of the vector."""
        return self.entries[-1].offset + self.entries[-1].size if self.entries else 0

    @property
    def parameters(self) -> int:
        """Number of values that are parameters."""
        return sum(entry.size for entry in self.entries if entry.trained)

    @cached_property
    def parts(self) -> dict[str, slice]:
        """Slice of each part of a joined layout."""
        slices: dict[str, slice] = {}
        for entry in self.entries:
            part = entry.name.partition("/")[0]
            start = slices[part].start if part in slices else entry.offset
            slices[part] = slice(start, entry.offset + entry.size)
        return slices

    @property
    def sizes(self) -> dict[str, int]:
        """Number of values in each part of a joined layout."""
        return {name: place.stop - place.start for name, place in self.parts.items()}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the layout's JSON, in hexadecimal."""
        return sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Return the entries as JSON: [name, shape, offset, trained] each."""
        return json.dumps([[e.name, list(e.shape), e.offset, e.trained] for e in self.entries])

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Return the layout that `to_json` wrote."""
        rows = json.loads(text)
        return cls(tuple(Entry(name, tuple(shape), offset, trained) for name, shape, offset, trained in rows))

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the named tensors of a vector (size,), without copying."""
        assert vector.shape == (self.size,)
        return {e.name: vector[e.offset : e.offset + e.size].view(e.shape) for e in self.entries}


def float_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the persistent float buffers: BatchNorm's running statistics, not its integer counter."""
    persistent = module.state_dict(keep_vars=True)
    return {name: t for name, t in module.named_buffers() if name in persistent and t.is_floating_point()}


def frozen_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost modules that have parameters, all of which require no gradient."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return {"": module}
    inner = {name: frozen_modules(child) for name, child in module.named_children()}
    return {f"{name}.{path}".rstrip("."): m for name, found in inner.items() for path, m in found.items()}


def tensors(module: nn.Module, frozen: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a module's vector, or of its frozen one, in order."""
    inside = tuple(f"{path}." if path else "" for path in frozen_modules(module))
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad != frozen}
    buffers = {name: t for name, t in float_buffers(module).items() if name.startswith(inside) == frozen}
    return {**parameters, **buffers}


def flatten(module: nn.Module, frozen: bool = False) -> Tensor:
    """Return a module's vector, or its frozen one, as a new CPU vector (layout.size,)."""
    return joined(pieces(module, frozen))


def pieces(module: nn.Module, frozen: bool = False) -> list[Tensor]:
    """Return the tensors of a module's vector, or of its frozen one, each flat on the CPU, in order."""
    return [t.detach().reshape(-1).cpu() for t in tensors(module, frozen).values()]


def joined(flat: Sequence[Tensor]) -> Tensor:
    """Return flat tensors one after the other as a new vector."""
    return torch.cat(list(flat)) if flat else torch.empty(0)


class Bound:
    """A module on its device whose trained parameters and buffers are views into `vector` (layout.size,).

    Its frozen tensors are views into `frozen` (frozen_layout.size,).
    """

    def __init__(self, module: nn.Module, device: torch.device, frozen: Tensor | None = None) -> None:
        """Bind a module.

        Args:
            frozen: the vector of the frozen tensors, on the device; None: a new one of the module's values.
        """
        self.module = module.float().to(device)
        if torch.are_deterministic_algorithms_enabled():  # on a GPU only
            deterministic.replace(self.module)
        self.layout, self.frozen_layout = Layout.of(self.module), Layout.of(self.module, frozen=True)
        self.vector = flatten(self.module).to(device)
        self.frozen = flatten(self.module, frozen=True).to(device) if frozen is None else frozen
        self._always_evaluated = list(frozen_modules(self.module).values())
        for frozen_module in self._always_evaluated:
            frozen_module.eval()
        bound = {**tensors(self.module), **tensors(self.module, frozen=True)}
        self.parameters = [t for name, t in tensors(self.module).items() if isinstance(t, nn.Parameter)]
        for layout, vector in ((self.layout, self.vector), (self.frozen_layout, self.frozen)):
            for name, view in layout.views(vector).items():
                bound[name].data = view
        outside = (t for name, t in self.module.named_buffers() if name not in bound)
        self._outside = [(t, t.clone()) for t in outside]
        self.check()

    @property
    def outside(self) -> list[Tensor]:
        """The buffers that are in neither vector."""
        return [buffer for buffer, _ in self._outside]

    def train(self, mode: bool) -> None:
        """Set the module to training with gradients, or to evaluation without; what is frozen stays so.

        A frozen BatchNorm keeps its statistics, and a dropout inside of a frozen module is off.
        """
        self.module.train(mode)
        for module in self._always_evaluated:
            module.eval()
        for parameter in self.parameters:
            parameter.requires_grad_(mode)

    def load(self, vector: Tensor) -> None:
        """Copy a client's or the server's vector in; reset the buffers that are in neither vector."""
        self.vector.copy_(vector, non_blocking=True)
        for buffer, initial in self._outside:
            buffer.copy_(initial)

    def check(self) -> None:
        """Assert that the module has the tensors of both layouts, each a view of its slice of the vector."""
        now = {**dict(self.module.named_parameters()), **float_buffers(self.module)}
        names = [entry.name for layout in (self.layout, self.frozen_layout) for entry in layout.entries]
        assert sorted(now) == sorted(names), "the module's tensors changed"
        for layout, vector in ((self.layout, self.vector), (self.frozen_layout, self.frozen)):
            for entry in layout.entries:
                tensor, expected = now[entry.name], vector.data_ptr() + 4 * entry.offset
                bound = tensor.shape == entry.shape and tensor.is_contiguous()
                is_view = bound and tensor.data_ptr() == expected
                assert is_view or not entry.size, f"{entry.name} is no longer a view of the vector"


class BoundTensor:
    """A named tensor as a part; `module` is its shaped view, as in `Bound`."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.layout = Layout.of_tensor(shape)
        self.vector = torch.zeros(self.layout.size, device=device)
        self.module = self.vector.view(shape)
        self.parameters: list[nn.Parameter] = []

    def load(self, vector: Tensor) -> None:
        """Copy a client's or the server's vector in."""
        self.vector.copy_(vector, non_blocking=True)

    def check(self) -> None:
        """Do nothing: a plain tensor is always a view of its vector."""
