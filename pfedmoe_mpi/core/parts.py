"""The named parts of a method's models, and a rank's workbench on which its clients are trained in turn.

A method specifies its parts (`Module`, `Tensor`). A rank holds one bound module per (part, architecture), not
one per client: a client is its vector, which is copied in before its turn and out after it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.flat import Bound, BoundTensor, Layout, flatten
from pfedmoe_mpi.models import generators
from pfedmoe_mpi.models.registry import Weightless


@dataclass(frozen=True)
class Module:
    """A part that is a module, built by `build`; equal `kind` means equal architecture.

    `weightless`: the layout may be taken from a module built without memory, as all of this program's can be.
    """

    kind: str
    build: Callable[[], nn.Module] = field(compare=False)
    weightless: bool = True

    def initial(self) -> torch.Tensor:
        """Return the vector of a newly initialised module; draws from the global generators."""
        return flatten(self.build())

    def layout(self) -> Layout:
        """Return the layout of that vector; the global generators are not changed."""
        with Weightless() if self.weightless else generators.kept():
            return Layout.of(self.build())


@dataclass(frozen=True)
class Tensor:
    """A part that is a plain float32 tensor; NaN marks values that are not yet defined."""

    shape: tuple[int, ...]
    fill: float = 0.0

    @property
    def kind(self) -> str:
        """Name of the shape."""
        return f"tensor{self.shape}"

    def initial(self) -> torch.Tensor:
        """Return the vector before round 1, all `fill`."""
        return torch.full((Layout.of_tensor(self.shape).size,), self.fill)


Spec = Mapping[str, Module | Tensor]


class Parts:
    """The parts of a client's turn as attributes: `parts.shared` is a module, `parts.prototypes` a tensor."""

    def __init__(self, bound: Mapping[str, Bound | BoundTensor]) -> None:
        self._bound = dict(bound)
        for name, part in bound.items():
            assert not hasattr(Parts, name), f"part '{name}' has the name of a method of Parts; rename it"
            setattr(self, name, part.module)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the method declares no part '{name}' in state or client_state")

    def vector(self, name: str) -> torch.Tensor:
        """Return the flat vector of a part (size,), on the device; writing to it changes the module."""
        return self._bound[name].vector

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of a part, in the order of its layout."""
        return self._bound[name].parameters

    def parameter_vector(self, name: str) -> torch.Tensor:
        """Return the leading slice of a part's vector, which holds the parameters without the buffers."""
        part = self._bound[name]
        return part.vector[: part.layout.parameters]

    def modules(self) -> dict[str, nn.Module]:
        """Return the parts that are modules, by name."""
        return {name: part.module for name, part in self._bound.items() if isinstance(part, Bound)}

    def train(self, names: Collection[str]) -> None:
        """Set the named parts to training with gradients, the others to evaluation without."""
        for name, part in self._bound.items():
            if isinstance(part, Bound):
                part.module.train(name in names)
                for parameter in part.trainable:
                    parameter.requires_grad_(name in names)

    def check(self) -> None:
        """Assert that every part is still bound to its vector."""
        for part in self._bound.values():
            part.check()


class Workbench:
    """The bound modules of a rank, and the layouts and initial vectors of specifications."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self._seed = seed
        self._bound: dict[tuple[str, str], Bound | BoundTensor] = {}
        self._layouts: dict[str, Layout] = {}

    def layout(self, spec: Spec) -> Layout:
        """Return the layout of the vector of `spec`; a kind is built once, on the meta device."""
        return Layout.join({name: self._layout(part) for name, part in spec.items()})

    def _layout(self, part: Module | Tensor) -> Layout:
        if isinstance(part, Tensor):
            return Layout.of_tensor(part.shape)
        if part.kind not in self._layouts:
            self._layouts[part.kind] = part.layout()
        return self._layouts[part.kind]

    def initial(self, spec: Spec, client: int = seeds.SERVER) -> torch.Tensor:
        """Return the vector (layout.size,) before round 1, on the CPU; it depends on seed, part, client."""
        vectors = [torch.empty(0)]
        for name, part in spec.items():
            seeds.seed_global(self._seed, f"initial/{name}", 0, client)
            vectors.append(part.initial())
        return torch.cat(vectors)

    def parts(self, *vectors: tuple[Spec, torch.Tensor]) -> Parts:
        """Return the parts of several specifications, loaded from their vectors."""
        loaded: dict[str, Bound | BoundTensor] = {}
        for spec, vector in vectors:
            slices = self.layout(spec).parts
            for name, part in spec.items():
                assert name not in loaded, f"part '{name}' is declared twice"
                loaded[name] = self._bind(name, part)
                loaded[name].load(vector[slices.get(name, slice(0))])  # a part may have no values
        return Parts(loaded)

    def _bind(self, name: str, part: Module | Tensor) -> Bound | BoundTensor:
        key = (name, part.kind)
        if key not in self._bound:
            if isinstance(part, Tensor):
                self._bound[key] = BoundTensor(part.shape, self.device)
            else:
                # Buffers that are not in the vector may be drawn too.
                seeds.seed_global(self._seed, f"bound/{name}/{part.kind}")
                self._bound[key] = Bound(part.build(), self.device)
        return self._bound[key]

    def read(self, spec: Spec, parts: Parts, out: torch.Tensor) -> torch.Tensor:
        """Copy the parts of `spec` from the bound modules into `out` (layout.size,) and return it."""
        for name, place in self.layout(spec).parts.items():
            out[place].copy_(parts.vector(name))
        return out
