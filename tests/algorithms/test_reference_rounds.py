"""Rounds of five methods agree with reference rounds in plain torch, written from the papers' equations.

The reference is `tests/oracles/`, which uses torch alone. The program trains a federation of three clients,
and the reference gets the same starting weights, cohorts and batches.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from oracles import methods, nets
from pfedmoe_mpi import config
from pfedmoe_mpi.config.methods import names
from pfedmoe_mpi.errors import RunError
from pfedmoe_mpi.models import mlp
from support.round_comparison import ALL_CLIENTS, VARIANTS, assert_tensors_agree, train_and_compare
from support.small_federation import (
    CLASSES,
    TrainedFederation,
    build_loop,
    train_federation,
    write_data_files,
)

METHODS = ("fedavg", "fedproto", "pfedmoe", "scaffold", "standalone")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_data_files(tmp_path_factory.mktemp("oracles"))


# Method by method: run the reference from the program's start and compare the results


def reference_pfedmoe(it: TrainedFederation) -> list[methods.Round]:
    options = it.loop.federation.config.options
    share, scale = options.share, 2 if options.mixture == "sum" else 1
    models = [nets.model(it.of_client(k, "model")) for k in range(3)]
    gates = [nets.gate(it.of_client(k, "gate")) for k in range(3)]
    theta: Any = nets.extractor(it.of_state("shared")) if share else None
    if not share:
        theta = [nets.extractor(it.of_client(k, "shared")) for k in range(3)]
    history = methods.pfedmoe(theta, models, gates, it.course, scale)
    for k in range(3):
        assert_tensors_agree(
            it.of_client(k, "model", start=False), nets.tensors(models[k]), f"ω of client {k}"
        )
        assert_tensors_agree(it.of_client(k, "gate", start=False), nets.tensors(gates[k]), f"φ of client {k}")
        if not share:
            assert_tensors_agree(
                it.of_client(k, "shared", start=False), nets.tensors(theta[k]), f"θ of client {k}"
            )
    if share:
        assert_tensors_agree(it.of_state("shared", start=False), nets.tensors(theta), "θ")
    return history


def reference_standalone(it: TrainedFederation) -> list[methods.Round]:
    models = [nets.model(it.of_client(k, "model")) for k in range(3)]
    history = methods.standalone(models, it.course)
    for k in range(3):
        assert_tensors_agree(
            it.of_client(k, "model", start=False), nets.tensors(models[k]), f"ω of client {k}"
        )
    assert not it.loop.state.numel()
    return history


def reference_fedavg(it: TrainedFederation) -> list[methods.Round]:
    model = nets.model(it.of_state("model"))
    history = methods.fedavg(model, it.course)
    assert_tensors_agree(it.of_state("model", start=False), nets.tensors(model), "w")
    assert not any(client.vector.numel() for client in it.loop.federation.clients.values())
    return history


def reference_fedproto(it: TrainedFederation) -> list[methods.Round]:
    models = [nets.model(it.of_client(k, "model")) for k in range(3)]
    prototypes: dict[int, Tensor] = {}
    assert it.state.isnan().all()
    chosen = it.loop.federation.config.options
    nearest = chosen.answer == "prototype"
    history = methods.fedproto(prototypes, models, it.course, chosen.weight, nearest)
    for k in range(3):
        assert_tensors_agree(
            it.of_client(k, "model", start=False), nets.tensors(models[k]), f"ω of client {k}"
        )
    rows = it.loop.state.view(4, -1)
    assert {c for c in range(4) if not rows[c].isnan().any()} == set(prototypes)
    assert_tensors_agree(
        {f"{c}": rows[c] for c in prototypes}, {f"{c}": prototypes[c] for c in prototypes}, "prototypes"
    )
    return history


def reference_scaffold(it: TrainedFederation) -> list[methods.Round]:
    model = nets.model(it.of_state("model"))
    own = [[torch.zeros_like(p) for p in model.parameters()] for _ in range(3)]
    c = [torch.zeros_like(p) for p in model.parameters()]
    lr_server = it.loop.federation.config.options.lr_server
    history = methods.scaffold(model, c, own, it.course, lr_server)
    assert_tensors_agree(it.of_state("model", start=False), nets.tensors(model), "x")
    assert_tensors_agree(it.of_state("control", start=False), {"": flat(c)}, "c")
    for k in range(3):
        assert_tensors_agree(
            it.of_client(k, "own_control", start=False), {"": flat(own[k])}, f"c_i of client {k}"
        )
    assert c[0].any(), "the server's control never moved"
    return history


REFERENCES: dict[str, Callable[[TrainedFederation], list[methods.Round]]] = {
    "pfedmoe": reference_pfedmoe,
    "standalone": reference_standalone,
    "fedavg": reference_fedavg,
    "fedproto": reference_fedproto,
    "scaffold": reference_scaffold,
}


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


# Rounds against the reference

LITERAL = {"gate.start": "paper", "pfedmoe.mixture": "mean"}  # the paper as it is written


def compare(
    path: Path, method: str, clients: frozenset[int] = ALL_CLIENTS, **changes: Any
) -> TrainedFederation:
    paper = LITERAL if method == "pfedmoe" else {}
    settings = {"model.pool": unlike(method), **paper, **changes}
    return train_and_compare(path, method, REFERENCES[method], settings, clients)


def unlike(method: str) -> str:
    return "mlp4" if method in {"fedavg", "scaffold"} else "mlp4,mlp5,mlp3"


def test_every_method_has_a_reference() -> None:
    import test_reference_classwise
    import test_reference_experts
    import test_reference_mutual
    import test_reference_personal

    others = (
        test_reference_classwise.REFERENCES,
        test_reference_experts.REFERENCES,
        test_reference_mutual.REFERENCES,
        test_reference_personal.REFERENCES,
    )
    assert set().union(REFERENCES, *others) == set(names())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rounds_match_the_reference(data: dict[str, Path], method: str, variant: str) -> None:
    it = compare(data["small"], method, **VARIANTS[variant])
    assert {len(cohort) for cohort in it.cohorts} == {{"some": 2, "all": 3, "one": 1}[variant]}
    if variant == "some":  # in round 2 client 2 has samples of a class with a prototype, and of one without
        assert it.cohorts[:2] == [[0, 1], [1, 2]]


def test_pfedmoes_defaults_match_the_reference(data: dict[str, Path]) -> None:
    """Gates that begin even, and the sum; after training, their weights differ by sample."""
    it = compare(data["small"], "pfedmoe", **{name: config.fields()[name].default for name in LITERAL})
    settings = it.loop.federation.config
    assert (settings.gate.start, settings.options.mixture) == ("even", "sum")
    gate = nets.gate(it.of_client(0, "gate", start=False)).eval()
    assert gate(it.samples[0].test[0])[:, 0].std() > 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_convolution_rounds_match_the_reference(data: dict[str, Path], method: str) -> None:
    pool = "cnn5" if method in {"fedavg", "scaffold"} else "cnn4,cnn5"
    compare(data["images"], method, **{"model.pool": pool, "rounds": 2, "train.epochs": 1})


@pytest.mark.parametrize("method", METHODS)
def test_rounds_with_batch_norm_match_the_reference(
    data: dict[str, Path], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running statistics belong to their module: averaged where it is shared, kept where it is private."""

    def normed(name: str, shape: tuple[int, ...], dim: int) -> nets.Dense:
        return nets.Dense(int(np.prod(shape)), 30, dim, norm=True)

    monkeypatch.setattr(mlp, "MLPExtractor", normed)
    it = compare(data["small"], method, **{"model.pool": "mlp5", "train.batch": 24})
    names = [entry.name for entry in it.loop.federation.state_layout.entries]
    assert any("running_var" in name for name in names) == (method not in {"standalone", "fedproto"})


@pytest.mark.parametrize(
    ("method", "option", "value"), [("fedproto", "weight", 7.0), ("scaffold", "lr_server", 0.5)]
)
def test_method_options_match_the_reference(
    data: dict[str, Path], method: str, option: str, value: float
) -> None:
    it = compare(data["small"], method, **{f"{method}.{option}": value})
    usual = train_federation(
        data["small"], method, model__pool=unlike(method), seed=it.loop.federation.config.seed
    )
    assert not torch.allclose(it.loop.state, usual.loop.state, atol=1e-3, equal_nan=True), (
        "the option changes nothing"
    )


def test_fedproto_can_answer_with_the_nearest_prototype(data: dict[str, Path]) -> None:
    """The head answers until the first sum; then only classes with a prototype do, here three of four."""
    it = compare(data["small"], "fedproto", **{"fedproto.answer": "prototype", "train.epochs": 1})
    usual = train_federation(
        data["small"],
        "fedproto",
        **{"model.pool": unlike("fedproto"), "train.epochs": 1, "seed": it.loop.federation.config.seed},
    )
    assert torch.equal(it.loop.state.nan_to_num(), usual.loop.state.nan_to_num())
    losses, by_head = (one.loop.history[0]["clients"]["loss"] for one in (it, usual))
    assert losses[2] is None and losses[:2] != by_head[:2] and None not in by_head


def test_accuracy_differs_before_and_after_aggregation(data: dict[str, Path]) -> None:
    """Otherwise comparing both with the reference would prove little."""
    for method in ("pfedmoe", "fedavg", "scaffold"):
        rows = train_federation(
            data["small"], method, model__pool=unlike(method), participation=1.0
        ).loop.history
        assert any(row["clients"]["accuracy"] != row["clients"]["accuracy_before"] for row in rows), method


def test_prototype_of_an_absent_class_stays_undefined(data: dict[str, Path]) -> None:
    it = train_federation(data["small"], "fedproto", model__pool="mlp5", rounds=1, participation=0.3)
    ((only,),) = it.cohorts
    rows = it.loop.state.view(4, -1)
    assert [c for c in range(4) if not rows[c].isnan().any()] == list(CLASSES[only])
    assert all(rows[c].isnan().all() for c in set(range(4)) - set(CLASSES[only]))
    while it.loop.round < 6 and set(chain(*it.cohorts)) == {only}:  # until another client comes up
        kept = it.loop.state.clone()
        assert it.loop.run_round()
    other = it.cohorts[-1][0]
    assert other != only
    lost = set(CLASSES[only]) - set(CLASSES[other])
    assert lost and all(torch.equal(it.loop.state.view(4, -1)[c], kept.view(4, -1)[c]) for c in lost)
    assert not it.loop.state.view(4, -1)[list(CLASSES[other])].isnan().any()


@pytest.mark.parametrize("method", METHODS)
def test_reported_bytes_are_those_of_a_deployment(data: dict[str, Path], method: str) -> None:
    it = train_federation(data["small"], method, model__pool=unlike(method), rounds=1)
    extractor = sum(t.numel() for t in it.of_state("shared").values())
    model = sum(t.numel() for t in it.of_state("model").values())
    numbers = {
        "pfedmoe": extractor,
        "standalone": 0,
        "fedavg": model,
        "fedproto": 2 * 12,
        "scaffold": 2 * model,
    }
    assert it.loop.history[0]["bytes"]["up"] == 4 * numbers[method]


def test_prototypes_are_sent_down_once_they_exist(data: dict[str, Path]) -> None:
    it = train_federation(data["small"], "fedproto", model__pool="mlp5", rounds=2, participation=1.0)
    assert [row["bytes"]["down"] for row in it.loop.history] == [0, 4 * 4 * 12]


@pytest.mark.parametrize("variant", VARIANTS)
def test_pfedmoe_without_sharing_trains_clients_alone(data: dict[str, Path], variant: str) -> None:
    """Every client has its own θ, which is never averaged."""
    it = compare(data["small"], "pfedmoe", **{"pfedmoe.share": False, **VARIANTS[variant]})
    assert not it.loop.state.numel() and it.loop.history[0]["bytes"] == {"up": 0, "down": 0, "once": 0}
    first, second = (it.of_client(k, "shared", start=False)["fc1.weight"] for k in (0, 1))
    assert not torch.allclose(first, second, atol=1e-3)


# A client whose values are not finite


@pytest.mark.parametrize(
    "clip", [0.0, 50.0]
)  # a norm that overflows is scaled to zero, and must show all the same
@pytest.mark.parametrize("method", METHODS)
def test_nonfinite_client_is_left_out(data: dict[str, Path], method: str, clip: float) -> None:
    """The round is that of the other clients, weighted by their samples; the client keeps its vector."""
    it = compare(data["spoilt"], method, ALL_CLIENTS - {1}, **{"participation": 1.0, "train.clip": clip})
    assert [row["dropped"] for row in it.loop.history] == [[1]] * 3
    assert it.cohorts == [[0, 2]] * 3 and it.loop.history[0]["cohort"] == [0, 1, 2]
    assert torch.equal(it.loop.federation.clients[1].vector, it.private[1])
    assert all(row["clients"]["accuracy_before"][1] is None for row in it.loop.history)


@pytest.mark.parametrize("method", METHODS)
def test_round_without_finite_clients_changes_nothing(data: dict[str, Path], method: str) -> None:
    """The learning rate is so large that no client's vector stays finite."""
    rates = dict.fromkeys(("train__lr", "train__lr_shared", "train__lr_gate"), 1e30)
    loop = build_loop(data["small"], method, model__pool=unlike(method), rounds=2, train__clip=0.0, **rates)
    state = loop.state.clone()
    private = {k: client.vector.clone() for k, client in loop.federation.clients.items()}
    with pytest.raises(RunError, match=r"round 1: .* of every client of the cohort is not finite"):
        loop.run()
    assert torch.equal(loop.state.nan_to_num(7), state.nan_to_num(7)) and loop.round == 0
    assert all(torch.equal(loop.federation.clients[k].vector, private[k]) for k in range(3))


@pytest.mark.parametrize("method", METHODS)
def test_nonfinite_client_can_stop_the_run(data: dict[str, Path], method: str) -> None:
    loop = build_loop(
        data["spoilt"],
        method,
        model__pool="mlp5",
        participation=1.0,
        train__clip=0.0,
        faults__nonfinite="stop",
    )
    with pytest.raises(RunError, match=r"round 1: .* of client 1 is not finite"):
        loop.run()
    assert loop.round == 0 and not loop.history
