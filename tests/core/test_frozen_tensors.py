"""Frozen tensors: outside of every vector, one copy for all parts of a kind, never changed by training."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from pfedmoe_mpi.core.flat import Layout, flatten, frozen_modules
from pfedmoe_mpi.core.parts import Module, Workbench
from pfedmoe_mpi.core.sgd import Optimiser, Phase
from pfedmoe_mpi.models import registry, trained

CPU = torch.device("cpu")


def backbone() -> nn.Module:
    body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False), nn.Dropout(0.9))
    body.requires_grad_(False)
    return nn.Sequential(body, nn.BatchNorm1d(5), nn.Linear(5, 3))


def test_two_vectors_divide_a_modules_tensors() -> None:
    module = backbone()
    layout, frozen = Layout.of(module), Layout.of(module, frozen=True)
    assert [entry.name for entry in layout.entries] == [
        *("1.weight", "1.bias", "2.weight", "2.bias", "1.running_mean", "1.running_var")
    ]
    assert [entry.name for entry in frozen.entries] == [
        *("0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias"),
        *("0.1.running_mean", "0.1.running_var", "0.2.running_mean", "0.2.running_var"),
    ]
    assert list(frozen_modules(module)) == ["0"] and not frozen.parameters
    assert len(flatten(module, frozen=True)) == frozen.size
    joined = Layout.join({"a": layout, "b": frozen})
    assert joined.part("b").digest == frozen.digest and joined.part("c").size == 0


def test_frozen_tensors_are_one_copy_that_training_does_not_change() -> None:
    part = Module("backbone", backbone)
    bench = Workbench(3, CPU)
    specs = {"a": part}, {"b": part}
    vectors = [bench.initial(spec, k) for k, spec in enumerate(specs)]
    parts = bench.parts(*zip(specs, vectors, strict=True))
    assert parts.a[0][0].weight.data_ptr() == parts.b[0][0].weight.data_ptr()
    before = bench.frozen(part).clone()
    parts.train(["a"])
    inside, outside = parts.a[0], parts.a[1]
    assert outside.training and not any(module.training for module in inside.modules())
    optimiser = Optimiser(parts, Phase({"a": 0.1}, 1, 0.9, 0.01, 50.0), 1.0)
    start = parts.vector("a").clone()
    for _ in range(3):
        optimiser.zero_grad()
        parts.a(torch.randn(8, 6)).square().sum().backward()
        optimiser.step()
    parts.check()
    assert torch.equal(bench.frozen(part), before) and not torch.equal(parts.vector("a"), start)
    assert not torch.equal(outside.running_mean, torch.zeros(5)), "what is trained keeps its statistics"
    # The values depend on seed and kind alone, so every rank and every run has the same.
    assert torch.equal(Workbench(3, CPU).frozen(part), before)
    assert not torch.equal(Workbench(4, CPU).frozen(part), before)


def test_given_values_replace_the_draw() -> None:
    part = Module("backbone", backbone)
    given = torch.arange(float(Layout.of(backbone(), frozen=True).size))
    bench = Workbench(3, CPU)
    bench.set_frozen("backbone", given)
    parts = bench.parts(({"a": part}, bench.initial({"a": part})))
    assert torch.equal(parts.a[0][0].weight.flatten(), given[:30])


@pytest.mark.parametrize("name", ["cnn5", "resnet18", "vit_b_32", "transformer", "lstm"])
def test_selections(name: str) -> None:
    text = name in {"transformer", "lstm"}
    shape, vocabulary = ((9,), 50) if text else ((3, 32, 32), 0)

    def chosen(train: str) -> set[str]:
        make = partial(registry.build_model, name, shape, 4, 12 if not text else 64, "small", vocabulary)
        with registry.Weightless():
            module = trained.build(make, train, 4, 4.0)
        return {key for key, parameter in module.named_parameters() if parameter.requires_grad}

    heads = {"head.weight", "head.bias"}
    last = {"cnn5": "fc2", "resnet18": "fc", "vit_b_32": "heads.head"}.get(name, "last")
    assert chosen("head") == heads | {f"extractor.{last}.weight", f"extractor.{last}.bias"}
    norms = chosen("norm") - chosen("head")
    assert bool(norms) == (name != "cnn5") and all(("bn" in n) or ("norm" in n) or ("ln" in n) or
                                                    ("downsample.1" in n) for n in norms)  # fmt: skip
    assert chosen(f"{last}.b*") == heads | {f"extractor.{last}.bias"}
    assert len(chosen("all")) == len(chosen("*")) > len(chosen("norm"))
