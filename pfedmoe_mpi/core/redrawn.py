"""Initial values of modules: one module of each kind is built, and drawn again for each client.

Of a small network most of the time of an initial draw would go into building modules and copying tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from pfedmoe_mpi.core.flat import Layout, flatten, tensors
from pfedmoe_mpi.models import generators

MOST = 2**22  # values of a kept module; a larger one spends its time on the draws


class Redrawn:
    """A module whose parameters and buffers are drawn again, in place, in one vector after the other."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._layout = Layout.of(module)
        self._tensors = tensors(module)

    def draw(self, out: torch.Tensor) -> None:
        """Draw the module's vector (layout.size,) into `out`, children before their parents."""
        for name, view in self._layout.views(out).items():
            self._tensors[name].data = view
        self.module.apply(lambda part: part.reset_parameters() if hasattr(part, "reset_parameters") else None)


def redrawn(build: Callable[[], nn.Module]) -> Redrawn | None:
    """Return a module that is drawn again with exactly the values that `build` draws; None: there is none.

    Both are compared once, from the present state of the global generators, which stays as it is. The module
    is built from another state, so that nothing of its own construction can be left in what is compared, and
    copied, because modules of the user's own may share submodules.
    """
    with generators.kept():
        built = flatten(build())
    again = torch.full_like(built, torch.nan)
    with generators.kept():
        generators.seed(0)
        module = build()
    with generators.kept():
        try:
            found = Redrawn(copy.deepcopy(module))
            found.draw(again)
        except Exception:  # a `reset_parameters` of the user's own may need arguments, or not work alone
            return None
    return found if torch.equal(again, built) else None
