"""Ditto, APFL, FedBN, FedPer, pFedAFM and FedEM against the reference rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from oracles import methods, nets, personal
from pfedmoe_mpi.models import mlp
from support.round_comparison import (
    VARIANTS,
    assert_tensors_agree,
    train_and_compare,
)
from support.small_federation import TrainedFederation, longer, train_federation, write_data_files


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_data_files(tmp_path_factory.mktemp("personal"))


def options(it: TrainedFederation) -> Any:
    return it.loop.federation.config.options


def copies(it: TrainedFederation) -> list[nn.Module]:
    """Return three models that begin as w^0."""
    return [nets.model(it.of_state("model")) for _ in range(3)]


def same_private(it: TrainedFederation, part: str, modules: list[Any]) -> None:
    for k in range(3):
        assert_tensors_agree(
            it.of_client(k, part, start=False), nets.tensors(modules[k]), f"{part} of client {k}"
        )


def reference_ditto(it: TrainedFederation) -> list[methods.Round]:
    model, own = nets.model(it.of_state("model")), copies(it)
    epochs = it.loop.federation.config.train.epochs
    history = personal.ditto(model, own, longer(it, 2 * epochs), options(it).weight, epochs)
    assert_tensors_agree(it.of_state("model", start=False), nets.tensors(model), "w")
    same_private(it, "personal", own)
    return history


def reference_apfl(it: TrainedFederation) -> list[methods.Round]:
    model, own = nets.model(it.of_state("model")), copies(it)
    alpha = [float(it.of_client(k, "alpha")[""]) for k in range(3)]
    assert alpha == [pytest.approx(options(it).alpha)] * 3
    history = personal.apfl(model, own, alpha, it.course, options(it).adaptive)
    assert_tensors_agree(it.of_state("model", start=False), nets.tensors(model), "w")
    same_private(it, "personal", own)
    found = [float(it.of_client(k, "alpha", start=False)[""]) for k in range(3)]
    assert found == pytest.approx(alpha, abs=1e-6)
    return history


def reference_fedbn(it: TrainedFederation) -> list[methods.Round]:
    models = copies(it)
    history = personal.fedbn(models, it.course)
    state = it.of_state("model", start=False)
    norms = [name for name in state if ".norm." in name]
    for k, module in enumerate(models):
        tensors = nets.tensors(module)
        own = {name: tensors[name] for name in norms}
        rest = {name: tensors[name] for name in tensors if name not in norms}
        assert_tensors_agree({name: state[name] for name in rest}, rest, "w outside of BatchNorm")
        found = it.of_client(k, "norms", start=False)[""] if norms else torch.zeros(0)
        if not found.isnan().any() and norms:
            assert_tensors_agree({"": found}, {"": torch.cat([t.view(-1) for t in own.values()])}, "norms")
    return history


def reference_fedper(it: TrainedFederation) -> list[methods.Round]:
    base = nets.extractor(it.of_state("base"))
    heads = [nets.loaded(nn.Linear(12, 4), it.of_client(k, "head")) for k in range(3)]
    history = personal.fedper(base, heads, it.course)
    assert_tensors_agree(it.of_state("base", start=False), nets.tensors(base), "base")
    same_private(it, "head", heads)
    return history


def reference_pfedafm(it: TrainedFederation) -> list[methods.Round]:
    theta = nets.extractor(it.of_state("shared"))
    models = [nets.model(it.of_client(k, "model")) for k in range(3)]
    alphas = [nn.Parameter(it.of_client(k, "weights")["alpha"].clone()) for k in range(3)]
    assert all(torch.equal(alpha, torch.ones(12)) for alpha in alphas)
    epochs = it.loop.federation.config.train.epochs
    history = personal.pfedafm(theta, models, alphas, longer(it, 2 * epochs), epochs)
    assert_tensors_agree(it.of_state("shared", start=False), nets.tensors(theta), "θ")
    same_private(it, "model", models)
    for k, alpha in enumerate(alphas):
        assert_tensors_agree(it.of_client(k, "weights", start=False), {"alpha": alpha.detach()}, "α")
    return history


def reference_fedem(it: TrainedFederation) -> list[methods.Round]:
    names = [f"component{m}" for m in range(options(it).components)]
    components = [nets.model(it.of_state(name)) for name in names]
    weights = [it.of_client(k, "weights")[""].clone() for k in range(3)]
    history = personal.fedem(components, weights, it.course)
    for name, module in zip(names, components, strict=True):
        assert_tensors_agree(it.of_state(name, start=False), nets.tensors(module), name)
    for k, own in enumerate(weights):
        assert_tensors_agree(it.of_client(k, "weights", start=False), {"": own}, f"π of client {k}")
    return history


REFERENCES: dict[str, Callable[[TrainedFederation], list[methods.Round]]] = {
    "ditto": reference_ditto,
    "apfl": reference_apfl,
    "fedbn": reference_fedbn,
    "fedper": reference_fedper,
    "pfedafm": reference_pfedafm,
    "fedem": reference_fedem,
}

WITHOUT = "a client that never trained has no "
NO_ANSWER = {
    "ditto": "personal",
    "apfl": "personal",
    "fedbn": "batch normalisation",
    "fedper": "head",
    "pfedafm": "model and no weights",
    "fedem": "",
}


def compare(path: Path, method: str, **changes: Any) -> TrainedFederation:
    return train_and_compare(path, method, REFERENCES[method], {"model.pool": "mlp4", **changes})


@pytest.mark.parametrize("method", REFERENCES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rounds_match_the_reference(data: dict[str, Path], method: str, variant: str) -> None:
    it = compare(data["small"], method, **VARIANTS[variant])
    assert {len(cohort) for cohort in it.cohorts} == {{"some": 2, "all": 3, "one": 1}[variant]}


@pytest.mark.parametrize("method", REFERENCES)
def test_rounds_with_batch_norm_match_the_reference(
    data: dict[str, Path], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def normed(name: str, shape: tuple[int, ...], dim: int) -> nets.Dense:
        return nets.Dense(int(np.prod(shape)), 30, dim, norm=True)

    monkeypatch.setattr(mlp, "MLPExtractor", normed)
    it = compare(data["small"], method, **{"model.pool": "mlp5", "train.batch": 24})
    sent = it.state.numel() - (4 * 30 if method == "fedbn" else 0)
    assert it.loop.history[0]["bytes"]["up"] == it.loop.history[0]["bytes"]["down"] == 4 * sent
    if method == "fedbn":
        norms = [it.of_client(k, "norms", start=False)[""] for k in it.cohorts[-1]]
        assert not torch.allclose(norms[0], norms[1])
    assert it.loop.federation.method.no_answer_reason.removeprefix(WITHOUT) == NO_ANSWER[method]


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("ditto", "weight", 1.0),
        ("apfl", "alpha", 0.2),
        ("apfl", "adaptive", False),
        ("fedem", "components", 2),
    ],
)
def test_method_options_match_the_reference(
    data: dict[str, Path], method: str, option: str, value: float
) -> None:
    it = compare(data["small"], method, **{f"{method}.{option}": value})
    same = {"model.pool": "mlp4", "seed": it.loop.federation.config.seed}
    usual = train_federation(data["small"], method, **same)
    first, second = (
        torch.cat([c.vector for c in one.loop.federation.clients.values()]) for one in (it, usual)
    )
    changed = len(first) != len(second) or not torch.allclose(first, second, atol=1e-4)
    assert changed, "the option changes nothing"


def test_weights_of_pfedafm_stay_between_0_and_1(data: dict[str, Path]) -> None:
    """The rounds above do not reach 0."""
    it = compare(data["small"], "pfedafm", **{"train.lr_gate": 10.0, "participation": 1.0})
    alpha = torch.cat([it.of_client(k, "weights", start=False)["alpha"] for k in range(3)])
    assert alpha.min() == 0 and alpha.max() == 1 and ((alpha > 0) & (alpha < 1)).any()


def test_steps_in_place_of_epochs_keep_the_weights_in_their_range(data: dict[str, Path]) -> None:
    """What follows an update follows the last one too: the clip of pFedAFM, and α_i of APFL's only step."""
    steps = {"participation": 1.0, "model.pool": "mlp4", "train.steps": 1}
    it = train_federation(data["small"], "pfedafm", **{**steps, "train.lr_gate": 10.0})
    alpha = torch.cat([it.of_client(k, "weights", start=False)["alpha"] for k in range(3)])
    assert alpha.min() < 0.9 and alpha.max() == 1
    it = train_federation(data["small"], "apfl", **steps)
    assert all(float(it.of_client(k, "alpha", start=False)[""]) != 0.5 for k in range(3))


def test_components_of_fedem_are_found_by_their_clients(data: dict[str, Path]) -> None:
    it = train_federation(data["small"], "fedem", **{"participation": 1.0, "rounds": 6, "model.pool": "mlp4"})
    weights = torch.stack([it.of_client(k, "weights", start=False)[""] for k in range(3)])
    assert torch.allclose(weights.sum(1), torch.ones(3)) and (weights.max(0).values > 0.5).sum() > 1
    spread = it.loop.history[-1]["gate"]["spread"]
    assert max(spread["clients"]) > 0.1 and max(spread["within"]) < 1e-6
