"""FedProx, FedRep, LG-FedAvg, FD, FedGH, FedTGP and FedSSA against the reference rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from oracles import classes, methods, nets
from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.federation.faults import Faults
from pfedmoe_mpi.federation.round_sum import IN, LOST
from pfedmoe_mpi.models import mlp
from support.round_comparison import VARIANTS, assert_tensors_agree, train_and_compare
from support.small_federation import (
    CLASSES,
    TrainedFederation,
    build_loop,
    longer,
    train_federation,
    write_data_files,
)

EQUAL = {"fedprox", "fedrep"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_data_files(tmp_path_factory.mktemp("classes"))


# The two sides


def options(it: TrainedFederation) -> Any:
    return it.loop.federation.config.options


def linear(tensors: dict[str, Tensor]) -> nn.Linear:
    found = nn.Linear(*reversed(tensors["weight"].shape))
    found.load_state_dict({name: t.clone() for name, t in tensors.items()})
    return found


def models_of(it: TrainedFederation) -> list[nn.Module]:
    return [nets.model(it.of_client(k, "model")) for k in range(3)]


def extractors_of(it: TrainedFederation) -> list[nn.Module]:
    return [nets.extractor(it.of_client(k, "extractor")) for k in range(3)]


def same_private(it: TrainedFederation, part: str, modules: list[Any]) -> None:
    for k in range(3):
        assert_tensors_agree(
            it.of_client(k, part, start=False), nets.tensors(modules[k]), f"{part} of client {k}"
        )


def same_state(it: TrainedFederation, part: str, module: nn.Module) -> None:
    assert_tensors_agree(it.of_state(part, start=False), nets.tensors(module), part)


def shuffles(it: TrainedFederation) -> list[list[Tensor]]:
    """Return the server's shuffles over one row for every class that a member of the cohort has."""
    config = it.loop.federation.config
    found = []
    for t, cohort in enumerate(it.cohorts):
        draw = seeds.torch_generator(config.seed, "server", t + 1)
        rows = sum(len(CLASSES[k]) for k in cohort)
        found.append([torch.randperm(rows, generator=draw) for _ in range(options(it).epochs)])
    return found


def reference_fedprox(it: TrainedFederation) -> list[methods.Round]:
    model = nets.model(it.of_state("model"))
    history = classes.fedprox(model, it.course, options(it).mu)
    same_state(it, "model", model)
    return history


def reference_fedrep(it: TrainedFederation) -> list[methods.Round]:
    body, heads = nets.extractor(it.of_state("body")), [linear(it.of_client(k, "head")) for k in range(3)]
    first = options(it).head_epochs
    course = longer(it, first + it.loop.federation.config.train.epochs)
    history = classes.fedrep(body, heads, course, first)
    same_state(it, "body", body)
    same_private(it, "head", heads)
    return history


def reference_lg_fedavg(it: TrainedFederation) -> list[methods.Round]:
    head, extractors = linear(it.of_state("head")), extractors_of(it)
    history = classes.lg_fedavg(head, extractors, it.course)
    same_state(it, "head", head)
    same_private(it, "extractor", extractors)
    return history


def reference_fd(it: TrainedFederation) -> list[methods.Round]:
    models = models_of(it)
    last: dict[int, dict[int, Tensor]] = {}
    seen: dict[int, dict[int, Tensor]] = {}
    history = classes.fd(last, models, it.course, options(it).weight, seen=seen)
    same_private(it, "model", models)
    outputs = it.of_state("outputs", start=False)[""]
    assert {c for c in range(4) if not outputs[c].isnan().any()} == set(last)
    means = {f"{c}": torch.stack(list(last[c].values())).mean(0) for c in last}
    assert_tensors_agree({f"{c}": outputs[c] for c in last}, means, "F̄")
    assert it.of_state("members", start=False)[""].tolist() == [len(last.get(c, {})) for c in range(4)]
    for k, found in seen.items():
        sums, counts = (it.of_client(k, part, start=False)[""] for part in ("sums", "counts"))
        assert set(counts.nonzero().view(-1).tolist()) == set(found)
        own = {f"{c}": sums[c] / counts[c] for c in found}
        assert_tensors_agree(own, {f"{c}": found[c] for c in found}, f"F of client {k}")
    return history


def reference_fedgh(it: TrainedFederation) -> list[methods.Round]:
    head, extractors = linear(it.of_state("head")), extractors_of(it)
    lr = options(it).lr or it.course.lr_shared
    history = classes.fedgh(head, extractors, it.course, shuffles(it), options(it).batch, lr)
    same_state(it, "head", head)
    same_private(it, "extractor", extractors)
    return history


def reference_fedtgp(it: TrainedFederation) -> list[methods.Round]:
    models, generator = models_of(it), dict(it.of_state("generator"))
    chosen, batch = options(it), it.loop.federation.config.train.batch
    nearest = chosen.answer == "prototype"
    history, prototypes = classes.fedtgp(
        generator, models, it.course, shuffles(it), batch, chosen.weight, chosen.margin, nearest
    )
    same_private(it, "model", models)
    assert_tensors_agree(it.of_state("generator", start=False), generator, "generator")
    assert_tensors_agree(it.of_state("prototypes", start=False), {"": torch.stack(prototypes)}, "prototypes")
    return history


def reference_fedssa(it: TrainedFederation) -> list[methods.Round]:
    models, start = models_of(it), it.of_state("header")["rows"]
    rows = [(row[:-1].clone(), row[-1].clone()) for row in start]
    history = classes.fedssa(rows, models, it.course, options(it).mu, options(it).stable_rounds)
    same_private(it, "model", models)
    expected = torch.stack([torch.cat([weight, bias.view(1)]) for weight, bias in rows])
    assert_tensors_agree(it.of_state("header", start=False), {"rows": expected}, "φ")
    return history


REFERENCES: dict[str, Callable[[TrainedFederation], list[methods.Round]]] = {
    "fedprox": reference_fedprox,
    "fedrep": reference_fedrep,
    "lg_fedavg": reference_lg_fedavg,
    "fd": reference_fd,
    "fedgh": reference_fedgh,
    "fedtgp": reference_fedtgp,
    "fedssa": reference_fedssa,
}
USUAL: dict[str, Any] = {"fedrep": {"fedrep.head_epochs": 2}, "fedtgp": {"fedtgp.epochs": 4}}


def unlike(method: str) -> str:
    return "mlp4" if method in EQUAL else "mlp4,mlp5,mlp3"


def compare(path: Path, method: str, **changes: Any) -> TrainedFederation:
    settings = {"model.pool": unlike(method), **USUAL.get(method, {}), **changes}
    return train_and_compare(path, method, REFERENCES[method], settings)


@pytest.mark.parametrize("method", REFERENCES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rounds_match_the_reference(data: dict[str, Path], method: str, variant: str) -> None:
    it = compare(data["small"], method, **VARIANTS[variant])
    assert {len(cohort) for cohort in it.cohorts} == {{"some": 2, "all": 3, "one": 1}[variant]}


@pytest.mark.parametrize("method", REFERENCES)
def test_rounds_with_batch_norm_match_the_reference(
    data: dict[str, Path], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running statistics belong to their module: averaged where it is shared, kept where it is private."""

    def normed(name: str, shape: tuple[int, ...], dim: int) -> nets.Dense:
        return nets.Dense(int(np.prod(shape)), 30, dim, norm=True)

    monkeypatch.setattr(mlp, "MLPExtractor", normed)
    it = compare(data["small"], method, **{"model.pool": "mlp5", "train.batch": 24})
    names = [entry.name for entry in it.loop.federation.state_layout.entries]
    assert any("running_var" in name for name in names) == (method in EQUAL)


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("fedprox", "mu", 3.0),
        ("fedrep", "head_epochs", 0),
        ("fd", "weight", 4.0),
        ("fedgh", "epochs", 3),
        ("fedgh", "lr", 0.2),
        ("fedgh", "batch", 3),
        ("fedtgp", "weight", 8.0),
        ("fedtgp", "epochs", 2),
        ("fedtgp", "margin", 0.05),
        ("fedssa", "mu", 0.9),
        ("fedssa", "stable_rounds", 0),
        ("fedssa", "stable_rounds", 5),
    ],
)
def test_method_options_match_the_reference(
    data: dict[str, Path], method: str, option: str, value: float
) -> None:
    it = compare(data["small"], method, **{f"{method}.{option}": value, "participation": 1.0})
    settings = it.loop.federation.config
    same = {"model.pool": unlike(method), "seed": settings.seed, "participation": 1.0}
    usual = train_federation(data["small"], method, **same, **USUAL.get(method, {}))
    found, expected = (
        torch.cat([one.loop.state, *(c.vector for c in one.loop.federation.clients.values())])
        for one in (it, usual)
    )
    assert not torch.allclose(found, expected, atol=1e-3, equal_nan=True), "the option changes nothing"


def test_fedtgp_can_predict_with_the_nearest_prototype(data: dict[str, Path]) -> None:
    it = compare(data["small"], "fedtgp", **{"fedtgp.answer": "prototype", "fedtgp.weight": 5.0})
    seed = it.loop.federation.config.seed
    usual = train_federation(
        data["small"], "fedtgp", model__pool=unlike(""), seed=seed, fedtgp__epochs=4, fedtgp__weight=5.0
    )
    assert torch.equal(it.loop.state, usual.loop.state), "training does not depend on the answer"
    assert it.loop.history[-1]["clients"]["loss"] != usual.loop.history[-1]["clients"]["loss"]


def test_fedprox_without_proximal_term_is_fedavg(data: dict[str, Path]) -> None:
    found, expected = (
        train_federation(data["small"], name, model__pool="mlp4", **more).loop.state
        for name, more in (("fedprox", {"fedprox__mu": 0.0}), ("fedavg", {}))
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# FD's teacher, where what a client sent got lost


LOST_ON_THE_WAY = {(2, 0), (2, 1), (3, 2)}  # round and client


def test_fd_teacher_excludes_only_outputs_in_the_mean(
    data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In round 3 the mean of class 1 is from round 1, whose parts its clients no longer have: no teacher."""
    monkeypatch.setattr(
        Faults, "fate", lambda _, round, client: LOST if (round, client) in LOST_ON_THE_WAY else IN
    )
    it = train_federation(
        data["small"], "fd", model__pool=unlike("fd"), participation=1.0, rounds=4, fd__weight=3.0, seed=3
    )
    models = models_of(it)
    lost = lambda t, k: (t + 1, k) in LOST_ON_THE_WAY  # noqa: E731
    classes.fd({}, models, it.course, options(it).weight, lost)
    same_private(it, "model", models)
    assert it.of_state("heard", start=False)[""].tolist() == [4.0, 4.0, 4.0]


def test_fd_teacher_of_an_unsent_class_is_the_whole_mean(data: dict[str, Path]) -> None:
    """The client contributed only to class 0 of that round's sum; the mean of class 1 is all others'."""
    found: Any = build_loop(data["small"], "fd", model__pool="mlp5").federation.method
    outputs = torch.full((4, 4), float("nan"))
    outputs[0] = torch.tensor([0.5, 0.3, 0.1, 0.1])
    outputs[1] = torch.tensor([0.1, 0.6, 0.2, 0.1])
    sums = torch.zeros(4, 4)
    sums[0] = 10 * torch.tensor([0.7, 0.1, 0.1, 0.1])
    parts = SimpleNamespace(
        outputs=outputs,
        members=torch.tensor([2.0, 1.0, 0.0, 0.0]),
        summed=torch.tensor([5.0, 5.0, 0.0, 0.0]),
        heard=torch.tensor([5.0, 0.0, 0.0]),
        sums=sums,
        counts=torch.tensor([10.0, 0.0, 0.0, 0.0]),
        stamp=torch.tensor([5.0]),
    )
    teacher = found.teacher(parts, 0)
    torch.testing.assert_close(teacher[0], torch.tensor([0.3, 0.5, 0.1, 0.1]))
    torch.testing.assert_close(teacher[1], outputs[1])
    assert teacher[2:].isnan().all()


# What a deployment sends, and clients that never train


@pytest.mark.parametrize("method", REFERENCES)
def test_reported_bytes_are_those_of_a_deployment(data: dict[str, Path], method: str) -> None:
    more = {name.replace(".", "__"): value for name, value in USUAL.get(method, {}).items()}
    it = train_federation(
        data["small"], method, model__pool=unlike(method), rounds=2, participation=1.0, **more
    )
    model = sum(t.numel() for part in ("model", "body") for t in it.of_state(part).values())
    head = 4 * (12 + 1)
    teachers = 4 * np.mean([1, 2, 1])  # of the three clients' classes two are held by two of them
    up, down = {
        "fedprox": (model, [model, model]),
        "fedrep": (model, [model, model]),
        "lg_fedavg": (head, [head, head]),
        "fd": (2 * 4, [0, teachers]),
        "fedgh": (2 * 12, [head, head]),
        "fedtgp": (2 * 12, [0, 4 * 12]),
        "fedssa": (2 * 13, [2 * 13, 2 * 13]),
    }[method]
    for row, expected in zip(it.loop.history, down, strict=True):
        assert row["bytes"]["up"] == pytest.approx(4 * up)
        assert row["bytes"]["down"] == pytest.approx(4 * expected)


@pytest.mark.parametrize("method", REFERENCES)
def test_methods_state_why_unseen_clients_have_no_model(data: dict[str, Path], method: str) -> None:
    it = train_federation(data["small"], method, model__pool=unlike(method), rounds=1, **{"train.epochs": 1})
    found: Algorithm = it.loop.federation.method
    reason = {
        "fedprox": "",
        "fedrep": "no head",
        "lg_fedavg": "no extractor",
        "fedgh": "no extractor",
    }.get(method, "no model")
    assert reason in found.no_answer_reason and bool(found.no_answer_reason) == bool(reason)
