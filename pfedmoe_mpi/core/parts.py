"""What methods build their models from: named parts, and the workbench of a rank where clients take turns.

A method names its parts as specifications (`Module`, `Tensor`). A rank holds one bound module per
(part, architecture), not one per client: a client is its vector, copied in before its turn and out after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.flat import Bound, BoundTensor, Layout, flatten
from pfedmoe_mpi.models.registry import Weightless


@dataclass(frozen=True)
class Module:
    """A module to be built; equal `kind` means equal architecture."""

    kind: str
    build: Callable[[], nn.Module] = field(compare=False)

    def initial(self) -> torch.Tensor:
        """The vector of a freshly initialised module (draws from torch's global generator)."""
        return flatten(self.build())

    def layout(self) -> Layout:
        """Where its tensors lie in that vector; takes no memory and draws nothing."""
        with Weightless():
            return Layout.of(self.build())


@dataclass(frozen=True)
class Tensor:
    """A named float32 tensor; NaN marks what is not yet defined."""

    shape: tuple[int, ...]
    fill: float = 0.0

    @property
    def kind(self) -> str:
        return f"tensor{self.shape}"

    def initial(self) -> torch.Tensor:
        return torch.full((Layout.of_tensor(self.shape).size,), self.fill)


Spec = Mapping[str, Module | Tensor]


class Parts:
    """The parts of one client's turn, by name: `parts.shared` is a module, `parts.prototypes` a tensor."""

    def __init__(self, bound: Mapping[str, Bound | BoundTensor]) -> None:
        self._bound = dict(bound)
        for name, part in bound.items():
            assert not hasattr(Parts, name), f"'{name}' is a method of Parts; call the part something else"
            setattr(self, name, part.module)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the method declared no part '{name}' in state or client_state")

    def vector(self, name: str) -> torch.Tensor:
        """The flat vector of a part (size,), on the device; writing to it changes the module."""
        return self._bound[name].vector

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters of a part, in the order of its layout."""
        return self._bound[name].parameters

    def parameter_vector(self, name: str) -> torch.Tensor:
        """The leading stretch of a part's vector that holds parameters, without buffers."""
        part = self._bound[name]
        return part.vector[: part.layout.parameters]

    def modules(self) -> dict[str, nn.Module]:
        """The parts that are modules."""
        return {name: part.module for name, part in self._bound.items() if isinstance(part, Bound)}

    def check(self) -> None:
        """Assert that no part came unbound."""
        for part in self._bound.values():
            part.check()


class Workbench:
    """The bound modules of a rank, layouts and first values."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self._seed = seed
        self._bound: dict[tuple[str, str], Bound | BoundTensor] = {}
        self._layouts: dict[str, Layout] = {}

    def layout(self, spec: Spec) -> Layout:
        """Where each part lies in the vector of `spec`; a kind is built once, on the meta device."""
        return Layout.join({name: self._layout(part) for name, part in spec.items()})

    def _layout(self, part: Module | Tensor) -> Layout:
        if isinstance(part, Tensor):
            return Layout.of_tensor(part.shape)
        if part.kind not in self._layouts:
            self._layouts[part.kind] = part.layout()
        return self._layouts[part.kind]

    def initial(self, spec: Spec, client: int = seeds.SERVER) -> torch.Tensor:
        """The vector (layout.size,) before round 1, on the CPU: a pure function of seed, part and client."""
        vectors = [torch.empty(0)]
        for name, part in spec.items():
            seeds.seed_global(self._seed, f"initial/{name}", 0, client)
            vectors.append(part.initial())
        return torch.cat(vectors)

    def parts(self, *vectors: tuple[Spec, torch.Tensor]) -> Parts:
        """The parts of several specifications, loaded from their vectors."""
        chosen: dict[str, Bound | BoundTensor] = {}
        for spec, vector in vectors:
            slices = self.layout(spec).parts
            for name, part in spec.items():
                assert name not in chosen, f"part '{name}' is declared twice"
                chosen[name] = self._bind(name, part)
                chosen[name].load(vector[slices.get(name, slice(0))])  # a part may hold no numbers
        return Parts(chosen)

    def _bind(self, name: str, part: Module | Tensor) -> Bound | BoundTensor:
        key = (name, part.kind)
        if key not in self._bound:
            if isinstance(part, Tensor):
                self._bound[key] = BoundTensor(part.shape, self.device)
            else:
                seeds.seed_global(self._seed, f"bound/{name}/{part.kind}")  # for buffers outside the vector
                self._bound[key] = Bound(part.build(), self.device)
        return self._bound[key]

    def read(self, spec: Spec, parts: Parts, out: torch.Tensor) -> torch.Tensor:
        """Copy the parts of `spec` out of the bound modules into `out` (layout.size,)."""
        for name, place in self.layout(spec).parts.items():
            out[place].copy_(parts.vector(name))
        return out
