"""Initial vectors: a kept module that is drawn again gives the bits that a new one draws."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pfedmoe_mpi.core import redrawn
from pfedmoe_mpi.core.parts import Module, Workbench
from pfedmoe_mpi.models import registry
from pfedmoe_mpi.models.gate import build_gate

SHAPE, CPU = (3, 8, 8), torch.device("cpu")


class DrawsLast(nn.Module):
    """Draws its weights by itself, after its layer has drawn them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        nn.init.normal_(self.layer.weight)


class NeedsArgument(nn.Linear):
    """Resets itself to a scale."""

    def __init__(self) -> None:
        self.ready = False
        super().__init__(4, 3)
        self.ready = True

    def reset_parameters(self, *scale: float) -> None:
        if self.ready:
            nn.init.constant_(self.weight, scale[0])
        else:
            super().reset_parameters()


class RandomMask(nn.Module):
    """Draws only where a mask, which it drew before, says so."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.rand(4) < 0.5
        self.weight = nn.Parameter(torch.zeros(4))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(self.mask * torch.rand(4))


COMMON = nn.Linear(4, 3)


class SharesLayer(nn.Module):
    """Has a layer that all of its kind share."""

    def __init__(self) -> None:
        super().__init__()
        self.common, self.own = COMMON, nn.Linear(3, 2)


OURS: dict[str, Callable[[], nn.Module]] = {
    "cnn5": lambda: registry.build_model("cnn5", (3, 32, 32), 4, 8, "small"),
    "mlp4": lambda: registry.build_extractor("mlp4", SHAPE, 8, "small"),
    "even gate": lambda: build_gate(SHAPE, 8, 2, start="even"),
    "even gate without BatchNorm": lambda: build_gate(SHAPE, 8, 2, start="even", batch_norm=False),
    "gate as published": lambda: build_gate(SHAPE, 8, 2, activation="gelu", layers=3),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "draws last": DrawsLast,
    "needs an argument": NeedsArgument,
    "random mask": RandomMask,
    "shares a layer": SharesLayer,
}


@pytest.mark.parametrize("name", [*OURS, *OTHERS])
def test_vectors_of_many_clients_are_those_of_new_modules(name: str) -> None:
    built = 0

    def build() -> nn.Module:
        nonlocal built
        built += 1
        return (OURS | OTHERS)[name]()

    part = Module(name, build, weightless=name in OURS)
    spec = {"first": part, "second": part}
    bench = Workbench(3, CPU)
    bench.layout(spec)
    built = 0
    vectors = [bench.initial(spec, client) for client in range(5)]
    assert (built < 5) == (name in OURS), "modules of this program are kept, others that cannot be are built"
    for client in (4, 0, 2):
        assert torch.equal(Workbench(3, CPU).initial(spec, client), vectors[client])
    sizes = bench.layout(spec).parts
    assert not torch.equal(vectors[1][sizes["first"]], vectors[1][sizes["second"]])


@pytest.mark.parametrize("start", ["architecture", "one"])
def test_kept_modules_know_how_models_start(start: str) -> None:
    spec = {"model": Module("mlp4", OURS["mlp4"]), "whole": Module("mlp5", lambda: _model("mlp5"))}
    bench = Workbench(3, CPU, start=start)
    vectors = [bench.initial(spec, client) for client in range(4)]
    assert all(torch.equal(vector, vectors[0]) for vector in vectors)
    assert torch.equal(vectors[0], Workbench(3, CPU, start=start).initial(spec, 9))


def _model(name: str) -> nn.Module:
    return registry.build_model(name, SHAPE, 4, 8, "small")


def test_large_modules_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redrawn, "MOST", 100)
    part = Module("mlp4", OURS["mlp4"])
    bench = Workbench(3, CPU)
    first, *rest = (bench.initial({"a": part}, 1) for _ in range(4))
    assert all(torch.equal(first, vector) for vector in rest) and not bench._redrawn
