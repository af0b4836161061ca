"""Flat vectors: the layout of tensors in a vector, and modules whose tensors are views into one vector.

A `Layout` names the slices of a contiguous float32 vector: parameters first, float buffers last. A `Bound` is
a module whose parameters and buffers are views into one vector, so that loading a client is a single copy.
Moving or deep-copying a bound module would break its views: move first, bind last, then check the binding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256

import torch
from torch import Tensor, nn


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
    def of(cls, module: nn.Module) -> Layout:
        """Return the layout of a module: parameters, then persistent float buffers.

        Tied weights appear once; integer buffers are not in the vector.
        """
        entries: list[Entry] = []
        offset = 0
        for trained, tensors in ((True, dict(module.named_parameters())), (False, float_buffers(module))):
            for name, tensor in tensors.items():
                assert tensor.dtype == torch.float32, f"{name} is {tensor.dtype}; a vector holds float32"
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


def flatten(module: nn.Module) -> Tensor:
    """Return the module's parameters and float buffers as a new CPU vector (layout.size,)."""
    tensors = [*dict(module.named_parameters()).values(), *float_buffers(module).values()]
    return torch.cat([t.detach().reshape(-1).cpu() for t in tensors]) if tensors else torch.empty(0)


class Bound:
    """A module on its device whose parameters and float buffers are views into `vector` (layout.size,).

    `trainable` are the parameters that required a gradient when the module was built.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module.float().to(device)
        self.trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.layout = Layout.of(self.module)
        self.vector = flatten(self.module).to(device)
        tensors = self._tensors()
        for name, view in self.layout.views(self.vector).items():
            tensors[name].data = view
        outside = (t for name, t in self.module.named_buffers() if name not in tensors)
        self._outside = [(t, t.clone()) for t in outside]
        self.check()

    def _tensors(self) -> dict[str, Tensor]:
        """Return the module's tensors that are in the vector, in the vector's order."""
        return {**dict(self.module.named_parameters()), **float_buffers(self.module)}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The module's parameters, in the order of the layout."""
        return list(self.module.parameters())

    def load(self, vector: Tensor) -> None:
        """Copy a client's or the server's vector in; reset the buffers that are not in the vector."""
        self.vector.copy_(vector, non_blocking=True)
        for buffer, initial in self._outside:
            buffer.copy_(initial)

    def check(self) -> None:
        """Assert that the module has the tensors of the layout, each a view of its slice of the vector."""
        tensors = self._tensors()
        assert list(tensors) == [entry.name for entry in self.layout.entries], "the module's tensors changed"
        for entry in self.layout.entries:
            tensor, expected = tensors[entry.name], self.vector.data_ptr() + 4 * entry.offset
            bound = tensor.shape == entry.shape and tensor.is_contiguous() and tensor.data_ptr() == expected
            assert bound or not entry.size, f"{entry.name} is no longer a view of the vector"


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
