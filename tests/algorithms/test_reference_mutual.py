"""FML, FedKD, FedAPEN and FedMRL against the reference rounds in `oracles/mutual.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from oracles import methods, mutual, nets
from pfedmoe_mpi import config
from pfedmoe_mpi.algorithms.fedkd import low_rank
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models import mlp
from support.round_comparison import ALL_CLIENTS, VARIANTS, assert_tensors_agree, train_and_compare
from support.small_federation import (
    TRAINING_SAMPLES,
    TrainedFederation,
    build_loop,
    train_federation,
    write_data_files,
)

POOL = "mlp4,mlp5,mlp3"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_data_files(tmp_path_factory.mktemp("mutual"))


def options(it: TrainedFederation) -> Any:
    return it.loop.federation.config.options


def started(it: TrainedFederation) -> tuple[nn.Module, list[nn.Module]]:
    """Return the shared model and every client's own as they started."""
    return nets.model(it.of_state("shared")), [nets.model(it.of_client(k, "model")) for k in range(3)]


def ended(it: TrainedFederation, shared: nn.Module, models: list[nn.Module]) -> None:
    assert_tensors_agree(it.of_state("shared", start=False), nets.tensors(shared), "the shared model")
    for k in range(3):
        assert_tensors_agree(
            it.of_client(k, "model", start=False), nets.tensors(models[k]), f"the model of client {k}"
        )


def linear(tensors: dict[str, Tensor]) -> nn.Module:
    out, into = tensors["weight"].shape
    return nets.loaded(nn.Linear(into, out, bias="bias" in tensors), tensors)


def reference_fml(it: TrainedFederation) -> list[methods.Round]:
    shared, models = started(it)
    history = mutual.fml(shared, models, it.course, options(it).alpha, options(it).beta)
    ended(it, shared, models)
    return history


def reference_fedapen(it: TrainedFederation) -> list[methods.Round]:
    shared, models = started(it)
    settings, chosen = it.loop.federation.config, options(it)
    weights = [0.5] * 3
    history = mutual.fedapen(
        shared,
        models,
        weights,
        held_out(it),
        it.course,
        chosen.lr_weight,
        chosen.passes,
        settings.train.batch,
    )
    ended(it, shared, models)
    for k in range(3):
        assert_tensors_agree(
            it.of_client(k, "weight", start=False), {"": torch.tensor(weights[k : k + 1])}, f"λ_{k}"
        )
    return history


def held_out(it: TrainedFederation) -> list[list[int]]:
    """Return the rows that only the ensemble weights are trained on, drawn from their random addresses."""
    found = []
    for k, n in enumerate(TRAINING_SAMPLES):
        generator = seeds.torch_generator(it.loop.federation.config.seed, "held out", 0, k)
        number = max(1, int(options(it).held_out * n + 0.5))
        found.append(torch.randperm(n, generator=generator)[:number].tolist())
    return found


def reference_fedmrl(it: TrainedFederation) -> list[methods.Round]:
    shared, models = started(it)
    projectors = [linear(it.of_client(k, "projector")) for k in range(3)]
    chosen = options(it)
    history = mutual.fedmrl(shared, models, projectors, it.course, chosen.weight_shared, chosen.weight_own)
    ended(it, shared, models)
    for k in range(3):
        assert_tensors_agree(
            it.of_client(k, "projector", start=False), nets.tensors(projectors[k]), f"projector {k}"
        )
    return history


def reference_fedkd(it: TrainedFederation) -> list[methods.Round]:
    shared, models = started(it)
    maps = [linear(it.of_client(k, "map")) for k in range(3)]
    chosen, rounds = options(it), it.loop.federation.config.rounds
    first, last = chosen.energy_start, chosen.energy_end
    energies = [first + (last - first) * min(t, chosen.ramp) / chosen.ramp for t in range(1, rounds + 1)]
    history, up, down = mutual.fedkd(shared, models, maps, it.course, energies)
    ended(it, shared, models)
    for k in range(3):
        assert_tensors_agree(it.of_client(k, "map", start=False), nets.tensors(maps[k]), f"W_h of client {k}")
    assert int(it.loop.state[-1]) == down[-1]
    whole = sum(t.numel() for t in it.of_state("shared").values())
    for t, row in enumerate(it.loop.history):
        assert row["bytes"]["up"] == pytest.approx(4 * np.mean(list(up[t].values())))
        received = [down[t - 1] if t and k in it.cohorts[t - 1] else whole for k in it.cohorts[t]]
        assert row["bytes"]["down"] == pytest.approx(4 * np.mean(received))
    return history


REFERENCES: dict[str, Callable[[TrainedFederation], list[methods.Round]]] = {
    "fml": reference_fml,
    "fedkd": reference_fedkd,
    "fedapen": reference_fedapen,
    "fedmrl": reference_fedmrl,
}


def compare(
    path: Path, method: str, clients: frozenset[int] = ALL_CLIENTS, **changes: Any
) -> TrainedFederation:
    return train_and_compare(path, method, REFERENCES[method], {"model.pool": POOL, **changes}, clients)


@pytest.mark.parametrize("method", REFERENCES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rounds_match_the_reference(data: dict[str, Path], method: str, variant: str) -> None:
    it = compare(data["small"], method, **VARIANTS[variant])
    assert {len(cohort) for cohort in it.cohorts} == {{"some": 2, "all": 3, "one": 1}[variant]}


@pytest.mark.parametrize("method", REFERENCES)
def test_convolution_rounds_match_the_reference(data: dict[str, Path], method: str) -> None:
    compare(data["images"], method, **{"model.pool": "cnn4,cnn5", "rounds": 2, "train.epochs": 1})


@pytest.mark.parametrize("method", REFERENCES)
def test_rounds_with_batch_norm_match_the_reference(
    data: dict[str, Path], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running statistics travel with the shared model."""

    def normed(name: str, shape: tuple[int, ...], dim: int) -> nets.Dense:
        return nets.Dense(int(np.prod(shape)), 30, dim, norm=True)

    monkeypatch.setattr(mlp, "MLPExtractor", normed)
    it = compare(data["small"], method, **{"model.pool": "mlp5", "train.batch": 24})
    assert any("running_var" in entry.name for entry in it.loop.federation.state_layout.entries)


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("fml", "alpha", 0.9),
        ("fml", "beta", 0.1),
        ("fedapen", "held_out", 0.5),
        ("fedapen", "lr_weight", 3.0),
        ("fedapen", "passes", 1),
        ("fedkd", "energy_start", 0.4),
        ("fedkd", "energy_end", 0.3),
        ("fedkd", "ramp", 1),
        ("fedmrl", "dim", 12),
        ("fedmrl", "weight_shared", 3.0),
        ("fedmrl", "weight_own", 0.2),
    ],
)
def test_method_options_match_the_reference(
    data: dict[str, Path], method: str, option: str, value: float
) -> None:
    base = {"fedapen.lr_weight": 1.0} if option == "passes" else {}
    it = compare(data["small"], method, **base, **{f"{method}.{option}": value})
    usual = train_federation(
        data["small"], method, **{"model.pool": POOL, "seed": it.loop.federation.config.seed, **base}
    )
    assert it.loop.state.shape != usual.loop.state.shape or not torch.allclose(
        it.loop.state, usual.loop.state, rtol=0, atol=1e-4
    ), "the option changes nothing"


def test_ensemble_weight_stays_in_its_range(data: dict[str, Path]) -> None:
    it = compare(data["small"], "fedapen", **{"fedapen.lr_weight": 100.0, "participation": 1.0})
    found = {float(it.of_client(k, "weight", start=False)[""]) for k in range(3)}
    assert found <= {0.0, 1.0}


@pytest.mark.parametrize("method", ["fml", "fedapen", "fedmrl"])
def test_reported_bytes_are_those_of_the_shared_model(data: dict[str, Path], method: str) -> None:
    it = train_federation(data["small"], method, model__pool=POOL, rounds=1)
    size = 4 * sum(t.numel() for t in it.of_state("shared").values())
    assert it.loop.history[0]["bytes"] == {"up": size, "down": size, "once": 0}


def test_low_rank_factors_save_bytes(data: dict[str, Path]) -> None:
    """A client that trains in every round exchanges less than the whole mentee, and less with less energy."""
    found = {}
    for energy in (0.3, 0.9, 1.0):
        both = dict.fromkeys(("fedkd__energy_start", "fedkd__energy_end"), energy)
        it = train_federation(data["small"], "fedkd", model__pool=POOL, participation=1.0, **both)
        whole = 4 * sum(t.numel() for t in it.of_state("shared").values())
        first, last = it.loop.history[0]["bytes"], it.loop.history[-1]["bytes"]
        assert first["down"] == whole
        found[energy] = (last["up"], last["down"])
    assert found[0.3] < found[0.9] < found[1.0] == (whole, whole)


def test_full_energy_equals_the_plain_mean(data: dict[str, Path]) -> None:
    it = train_federation(
        data["small"], "fedkd", model__pool=POOL, fedkd__energy_start=1.0, fedkd__energy_end=1.0
    )
    less = train_federation(data["small"], "fedkd", model__pool=POOL)
    assert not torch.allclose(it.loop.state, less.loop.state, atol=1e-4)


def test_low_rank_factors_are_the_truncated_svd() -> None:
    draw = np.random.default_rng(0)
    left, right = (np.linalg.qr(draw.normal(size=(n, 4)))[0] for n in (30, 20))
    sigma = np.array([3.0, 2.0, 1.0, 0.5])
    matrix = torch.from_numpy((left * sigma) @ right.T).float()
    shares = (sigma**2).cumsum() / (sigma**2).sum()
    for rank in (1, 2, 3, 4):
        threshold = 0.999 * shares[rank - 1]
        rebuilt, numbers = low_rank(matrix, threshold)
        assert numbers == rank * 51
        np.testing.assert_allclose(rebuilt, (left[:, :rank] * sigma[:rank]) @ right[:, :rank].T, atol=1e-6)
    assert low_rank(torch.randn(6, 5), 1.0) is None, "factors larger than the matrix"
    assert low_rank(torch.full((9, 9), float("inf")), 0.5) is None


@pytest.mark.parametrize("method", REFERENCES)
@pytest.mark.parametrize("clip", [0.0, 50.0])
def test_nonfinite_client_is_left_out(data: dict[str, Path], method: str, clip: float) -> None:
    it = compare(data["spoilt"], method, ALL_CLIENTS - {1}, **{"participation": 1.0, "train.clip": clip})
    assert [row["dropped"] for row in it.loop.history] == [[1]] * 3
    assert torch.equal(it.loop.federation.clients[1].vector, it.private[1])


@pytest.mark.parametrize("method", REFERENCES)
def test_shared_model_answers_for_unseen_clients(data: dict[str, Path], method: str) -> None:
    """The shared model answers alone; FedMRL cannot, because its shared head reads a private projector."""
    loop = build_loop(data["small"], method, model__pool=POOL, rounds=1)
    assert loop.run()
    federation = loop.federation
    client = federation.clients[0]
    parts = federation.workbench.parts(
        (loop.federation.method.state(), loop.state), (client.spec, client.vector)
    )
    for module in parts.modules().values():
        module.eval()
    x = torch.randn(5, 3, 8, 8)
    answer = federation.method.predictor(parts, lambda: iter(()), unseen=True)
    with torch.no_grad():
        if method == "fedmrl":
            assert answer is None and "projector" in federation.method.no_answer_reason
        else:
            assert (
                answer and torch.equal(answer(x), parts.shared(x)) and not federation.method.no_answer_reason
            )
        seen = federation.method.predictor(parts, lambda: iter(()), unseen=False)
        assert seen and torch.equal(seen(x), federation.method.predict(parts, x))


def test_nested_length_above_the_representation_is_refused(data: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"fedmrl\.dim = 13 exceeds model\.dim = 12"):
        build_loop(data["small"], "fedmrl", model__pool=POOL, fedmrl__dim=13)
    assert config.build({"algorithm": "fedmrl"}).options.dim == 0
