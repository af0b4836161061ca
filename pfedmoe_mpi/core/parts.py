"""The named parts of a method's models, and a rank's workbench on which its clients are trained in turn.

A method specifies its parts (`Module`, `Tensor`). A rank holds one bound module per (part, architecture), not
one per client: a client is its vector, which is copied in before its turn and out after it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from pfedmoe_mpi.core import redrawn, seeds
from pfedmoe_mpi.core.flat import Bound, BoundTensor, Layout, joined, pieces
from pfedmoe_mpi.core.kept import Kept
from pfedmoe_mpi.models import generators, pretrained
from pfedmoe_mpi.models.pretrained import Weights
from pfedmoe_mpi.models.registry import Model, Weightless


@dataclass(frozen=True)
class Module:
    """A part that is a module, built by `build`; equal `kind` means equal architecture.

    `weightless`: the layout may be taken from a module built without memory, as all of this program's can be.
    `architecture`: the name by which `model.weights` gives it a file; empty: it always draws its values.
    """

    kind: str
    build: Callable[[], nn.Module] = field(compare=False)
    weightless: bool = True
    architecture: str = field(default="", compare=False)

    def initial(
        self,
        weights: Weights | None = None,
        frozen: bool = False,
        seed_head: Callable[[], None] | None = None,
    ) -> list[torch.Tensor]:
        """Return the pieces of the vector of a new module, or of its frozen one, in order.

        It draws from the global generators.

        Args:
            seed_head: seeds them once more for a draw of the head, if the module is a model.
        """
        module = self.build()
        if seed_head:
            _draw_head(module, seed_head)
        if weights:
            pretrained.fill(module, weights)
        return pieces(module, frozen)

    def layout(self) -> Layout:
        """Return the layout of that vector; the global generators are not changed."""
        return Layout.of(self.skeleton())

    def skeleton(self) -> nn.Module:
        """Return the module without memory if possible; the global generators are not changed."""
        with Weightless() if self.weightless else generators.kept():
            return self.build()


def _draw_head(module: nn.Module, seed_head: Callable[[], None]) -> None:
    """Draw the head of a model once more, from generators seeded again."""
    if isinstance(module, Model):
        seed_head()
        module.head.reset_parameters()


@dataclass(frozen=True)
class Tensor:
    """A part that is a plain float32 tensor.

    NaN marks values that are not yet defined. A client in whose private tensor it appears has diverged,
    unless `fill` is NaN.
    """

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


def modules_by_kind(specs: Iterable[Spec]) -> dict[str, Module]:
    """Return one module of each kind in these specifications, in the order of their kinds."""
    parts = (part for spec in specs for part in spec.values())
    by_kind = {part.kind: part for part in parts if isinstance(part, Module)}
    return dict(sorted(by_kind.items()))


def _undeclared(name: str) -> str:
    return f"the method declares no part '{name}' in state or client_state"


class Parts:
    """The parts of a client's turn as attributes: `parts.shared` is a module, `parts.prototypes` a tensor."""

    def __init__(self, bound: Mapping[str, Bound | BoundTensor]) -> None:
        self._bound = dict(bound)
        self._values: Mapping[str, Sequence[Any]] = {}  # in place of the parameters, by part
        for name, part in bound.items():
            assert not hasattr(Parts, name), f"part '{name}' has the name of a method of Parts; rename it"
            setattr(self, name, part.module)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_undeclared(name))

    def vector(self, name: str) -> torch.Tensor:
        """Return the flat vector of a part (size,), on the device; writing to it changes the module."""
        return self._part(name).vector

    def _part(self, name: str) -> Bound | BoundTensor:
        if name not in self._bound:
            raise KeyError(_undeclared(name))
        return self._bound[name]

    def parameters(self, name: str) -> Sequence[nn.Parameter]:
        """Return the parameters of a part, in the order of its layout.

        A loss asks for them each time: in DP-SGD it is computed with other tensors in their place.
        """
        return self._values.get(name) or self._part(name).parameters

    def with_parameters(
        self, values: Mapping[str, Sequence[Any]], function: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Return what `function` returns with other tensors as the parameters of these parts."""
        named = {
            f"{_PREFIX}{part}.{entry.name}": value
            for part in values
            for entry, value in zip(self._bound[part].layout.entries, values[part], strict=False)
        }
        self._values = values
        try:
            result: torch.Tensor = functional_call(_Modules(self.modules(), function), named, ())
            return result
        finally:
            self._values = {}

    def parameter_vector(self, name: str) -> torch.Tensor:
        """Return the leading slice of a part's vector, which holds the parameters without the buffers."""
        part = self._part(name)
        return part.vector[: part.layout.parameters]

    def modules(self) -> dict[str, nn.Module]:
        """Return the parts that are modules, by name."""
        modules = ((name, part.module) for name, part in self._bound.items())
        return {name: module for name, module in modules if isinstance(module, nn.Module)}

    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Return where the vector of each part lies; equal for all clients of an architecture."""
        return tuple((name, part.vector.data_ptr()) for name, part in self._bound.items())

    def state_tensors(self) -> list[torch.Tensor]:
        """Return the vectors, and the buffers outside of them."""
        bound = self._bound.values()
        outside = [buffer for part in bound if isinstance(part, Bound) for buffer in part.outside]
        return [*(part.vector for part in bound), *outside]

    def train(self, names: Collection[str]) -> None:
        """Set the named parts to training with gradients, the others to evaluation without."""
        for name, part in self._bound.items():
            if isinstance(part, Bound):
                part.train(name in names)

    def check(self) -> None:
        """Assert that every part is still bound to its vector."""
        for part in self._bound.values():
            part.check()


_PREFIX = "part "  # a module's attributes have no such name


class _Modules(nn.Module):
    """Modules around a function, for `torch.func.functional_call`, which exchanges their parameters."""

    def __init__(self, modules: Mapping[str, nn.Module], function: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(_PREFIX + name, module)
        self._function = function

    def forward(self) -> torch.Tensor:
        return self._function()


class Workbench:
    """The bound modules of a rank, and the layouts and initial vectors of specifications.

    `weights` are read by architecture, and replace the initial draw; `start` is the setting `model.start`.
    `kept`, which may be set before the first part is bound, has the outputs of frozen layers.
    """

    def __init__(
        self,
        seed: int,
        device: torch.device,
        weights: Mapping[str, Weights] | None = None,
        start: str = "own",
    ) -> None:
        self.device = device
        self.kept: Kept | None = None
        self._seed = seed
        self._start = start
        self._weights = weights or {}
        self._frozen: dict[str, torch.Tensor] = {}  # by kind, on the device
        self._drawn: set[str] = set()  # kinds
        self._redrawn: dict[str, redrawn.Redrawn | None] = {}  # by kind
        self._bound: dict[tuple[str, str], Bound | BoundTensor] = {}
        self._layouts: dict[str, tuple[Layout, Layout]] = {}  # by kind: of the vector, of the frozen one
        self._joined: dict[tuple[tuple[str, str], ...], Layout] = {}  # by the parts' names and kinds

    def layout(self, spec: Spec) -> Layout:
        """Return the layout of the vector of `spec`; a kind is built once, on the meta device."""
        kinds = tuple((name, part.kind) for name, part in spec.items())
        if kinds not in self._joined:
            self._joined[kinds] = Layout.join({name: self._layout(part) for name, part in spec.items()})
        return self._joined[kinds]

    def _layout(self, part: Module | Tensor) -> Layout:
        return Layout.of_tensor(part.shape) if isinstance(part, Tensor) else self._both_layouts(part)[0]

    def _both_layouts(self, part: Module) -> tuple[Layout, Layout]:
        if part.kind not in self._layouts:
            module = part.skeleton()
            self._layouts[part.kind] = Layout.of(module), Layout.of(module, frozen=True)
        return self._layouts[part.kind]

    def frozen_layout(self, part: Module) -> Layout:
        """Return the layout of the part's frozen vector; a kind is built once, on the meta device."""
        return self._both_layouts(part)[1]

    def frozen(self, part: Module) -> torch.Tensor:
        """Return the frozen vector (frozen_layout.size,) of all parts of this kind, on the device.

        One that was not set is drawn, or taken from the weights.
        """
        if part.kind not in self._frozen:
            vector = torch.empty(0)
            if self.frozen_layout(part).size:
                seeds.seed_global(self._seed, f"frozen/{part.kind}")
                vector = joined(part.initial(self._weights.get(part.architecture), frozen=True))
            self._frozen[part.kind] = vector.to(self.device)
        return self._frozen[part.kind]

    def set_frozen(self, kind: str, vector: torch.Tensor) -> None:
        """Set the frozen vector of a kind, before the first part of this kind is bound."""
        self._frozen[kind] = vector.to(self.device)

    def initial(self, spec: Spec, client: int = seeds.SERVER) -> torch.Tensor:
        """Return the vector (layout.size,) before round 1, on the CPU.

        It depends on the seed, the parts' names and, with `start` = own, on the client.
        """
        layout = self.layout(spec)
        vector = torch.empty(layout.size)
        owner = client if self._start == "own" else seeds.SERVER
        one_head = self._start == "one" and client != seeds.SERVER
        for name, part in spec.items():
            seeds.seed_global(self._seed, f"initial/{name}", 0, owner)
            out = vector[layout.parts.get(name, slice(0))]  # a part may have no values
            if isinstance(part, Tensor):
                out.copy_(part.initial())
            else:
                seed_head = partial(seeds.seed_global, self._seed, f"initial/head of {name}")
                self._draw(part, seed_head if one_head else None, out)
        return vector

    def _draw(self, part: Module, seed_head: Callable[[], None] | None, out: torch.Tensor) -> None:
        """Draw the initial values of a part into its place in a vector."""
        weights = self._weights.get(part.architecture)
        kept = None if weights or self._layout(part).size > redrawn.MOST else self._kept_module(part)
        if kept:
            kept.draw(out)
            if seed_head:
                _draw_head(kept.module, seed_head)
        elif found := part.initial(weights, seed_head=seed_head):
            torch.cat(found, out=out)

    def _kept_module(self, part: Module) -> redrawn.Redrawn | None:
        """Return the module that is drawn again for this part; None the first time, or if there is none."""
        if part.kind not in self._redrawn:
            if part.kind not in self._drawn:
                self._drawn.add(part.kind)
                return None
            self._redrawn[part.kind] = redrawn.redrawn(part.build)
        return self._redrawn[part.kind]

    def draws(self, spec: Spec) -> bool:
        """Return whether all of the initial vector is drawn, and nothing comes from a file of weights."""
        return not any(
            isinstance(part, Module) and part.architecture in self._weights for part in spec.values()
        )

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
                frozen = self.frozen(part)
                # Buffers that are not in the vector may be drawn too.
                seeds.seed_global(self._seed, f"bound/{name}/{part.kind}")
                self._bound[key] = bound = Bound(part.build(), self.device, frozen)
                if self.kept:
                    self.kept.install(part.kind, bound.module)
        return self._bound[key]

    def read(self, spec: Spec, parts: Parts, out: torch.Tensor) -> torch.Tensor:
        """Copy the parts of `spec` from the bound modules into `out` (layout.size,) and return it."""
        for name, place in self.layout(spec).parts.items():
            out[place].copy_(parts.vector(name))
        return out
