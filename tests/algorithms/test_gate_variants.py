"""Variants of pFedMoE that its paper leaves open: other gates, fixed weights, several shared extractors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfedmoe_mpi import config
from pfedmoe_mpi.algorithms.base import Task
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models.gate import Gate, build_gate
from support.launcher import SMALL_RUN, checkpoint_digest, read_metrics, run_to_end
from support.small_federation import (
    build_loop,
    first_batch,
    loss_gradients,
    train_federation,
    weights_of,
    write_data_files,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_data_files(tmp_path_factory.mktemp("gates"))


def alpha_of(path: Path, **changes: Any) -> torch.Tensor:
    """Return gate weights (16, experts) of a client's first samples after a round."""
    it = train_federation(path, "pfedmoe", model__pool="mlp5", rounds=1, **changes)
    method, parts, batch = first_batch(it.loop)
    for module in parts.modules().values():
        module.eval()
    with torch.no_grad():
        alpha = weights_of(method, parts, batch.x)
    assert torch.allclose(alpha.sum(1), torch.ones(16))
    return alpha


def gate_of(**options: Any) -> Gate:
    torch.manual_seed(0)
    return Gate(12, 3, hidden=8, **options).eval()


def test_temperature_divides_the_logits() -> None:
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, two = gate_of(temperature=1.0)(x), gate_of(temperature=2.0)(x)
    torch.testing.assert_close(two, torch.softmax(one.log() / 2, 1))
    assert not torch.allclose(one, two, atol=1e-3)


def test_top1_uses_one_expert_with_softmax_gradients() -> None:
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
    soft, hard = gate_of(), gate_of(routing="top1")
    weights, chosen = soft(x), hard(x)
    assert torch.equal(chosen.detach(), torch.nn.functional.one_hot(weights.argmax(1), 3).float())
    value = torch.randn(20, 3, generator=torch.Generator().manual_seed(2))
    for gate, out in ((soft, weights), (hard, chosen)):
        (out * value).sum().backward()
        assert float(gate.layers[0].weight.grad.abs().max()) > 0
    torch.testing.assert_close(soft.layers[0].weight.grad, hard.layers[0].weight.grad)


def test_top1_predicts_with_one_expert(data: dict[str, Path]) -> None:
    alpha = alpha_of(data["small"], gate__routing="top1")
    assert set(alpha.flatten().tolist()) == {0.0, 1.0}


def test_equal_weights_have_no_gate_parameters(data: dict[str, Path]) -> None:
    assert torch.equal(alpha_of(data["small"], gate__weights="equal"), torch.full((16, 2), 0.5))
    loop = build_loop(data["small"], "pfedmoe", model__pool="mlp5", gate__weights="equal")
    assert "gate" not in {name.partition("/")[0] for name in loss_gradients(loop)}


def test_learned_constants_train_and_ignore_the_sample(data: dict[str, Path]) -> None:
    alpha = alpha_of(data["small"], gate__weights="learned", participation=1.0)
    assert torch.equal(alpha, alpha[:1].expand(16, 2)) and not torch.allclose(alpha[0], torch.tensor(0.5))


def test_pooled_gate_sees_the_downsampled_image() -> None:
    torch.manual_seed(0)
    gate = build_gate((3, 32, 32), 50, 2, input="pooled", hidden=4).eval()
    x = torch.randn(5, 3, 32, 32)
    same = torch.nn.functional.interpolate(torch.nn.functional.adaptive_avg_pool2d(x, 8), scale_factor=4)
    with torch.no_grad():
        assert torch.allclose(gate(x), gate(same), atol=1e-6)
        assert not torch.allclose(gate(x), gate(x + torch.randn(5, 3, 1, 1)), atol=1e-3)


def test_pooled_gate_requires_images() -> None:
    task = Task(config.build({"gate.input": "pooled"}), (7,), 2, np.ones((2, 2), int), ("mlp5",), "mlp5", 5)
    with pytest.raises(ConfigError, match="needs images"):
        task.gate()


def test_representation_gate_sends_no_gradient_to_its_input(data: dict[str, Path]) -> None:
    """Without the mixture's own gradient path, no gradient reaches θ."""
    loop = build_loop(data["small"], "pfedmoe", model__pool="mlp5", gate__input="shared", model__dim=30)
    method, parts, batch = first_batch(loop)
    assert parts.gate.layers[0].in_features == 30
    weights = weights_of(method, parts, batch.x)
    (weights[:, 0] * torch.arange(16)).sum().backward()
    assert all(p.grad is None for p in parts.shared.parameters())
    assert any(p.grad is not None and p.grad.any() for p in parts.gate.parameters())
    assert all(largest > 0 for name, largest in loss_gradients(loop).items() if name.startswith("shared/"))


def test_several_shared_extractors_all_train_and_differ(data: dict[str, Path]) -> None:
    it = train_federation(
        data["small"], "pfedmoe", model__pool="mlp5", rounds=1, pfedmoe__extractors=3, participation=1.0
    )
    names = ["shared", "shared2", "shared3"]
    before, after = ([it.of_state(name, start)["fc1.weight"] for name in names] for start in (True, False))
    for number in range(3):
        assert not torch.equal(before[number], after[number])
        assert not torch.allclose(before[number], before[number - 1], atol=1e-3)
    assert alpha_of(data["small"], pfedmoe__extractors=3).shape == (16, 4)
    sizes = sum(t.numel() for name in names for t in it.of_state(name).values())
    assert it.loop.history[0]["bytes"]["up"] == 4 * sizes


def test_mean_alpha_covers_all_shared_extractors(data: dict[str, Path]) -> None:
    it = train_federation(
        data["small"], "pfedmoe", model__pool="mlp5", rounds=1, pfedmoe__extractors=2, gate__weights="equal"
    )
    assert it.loop.history[0]["clients"]["alpha"] == [pytest.approx(2 / 3)] * 3


def test_sum_gives_the_head_the_mixture_times_the_experts(data: dict[str, Path]) -> None:
    loops = [
        build_loop(data["small"], "pfedmoe", model__pool="mlp5", pfedmoe__mixture=mixture, **EXTRACTORS)
        for mixture in ("mean", "sum")
    ]
    outputs = []
    for loop in loops:
        method, parts, batch = first_batch(loop)
        parts.model.head.bias.data.zero_()
        outputs.append(method.predict(parts, batch.x))
    torch.testing.assert_close(outputs[1], 3 * outputs[0])


def test_sum_leaves_the_one_expert_of_top1_as_it_is(data: dict[str, Path]) -> None:
    answers = []
    for mixture in ("mean", "sum"):
        changes = {"gate__routing": "top1", "pfedmoe__mixture": mixture}
        loop = build_loop(data["small"], "pfedmoe", model__pool="mlp5", **changes)
        method, parts, batch = first_batch(loop)
        answers.append(method.predict(parts, batch.x))
    assert torch.equal(*answers)


@pytest.mark.parametrize(("method", "start"), [("pfedmoe", "even"), ("fedmix", "paper")])
def test_gate_begins_even_by_default_in_pfedmoe_alone(data: dict[str, Path], method: str, start: str) -> None:
    """The run records which of the two it was; FedMix's gate is the program's own, too."""
    loop = build_loop(data["small"], method, model__pool="mlp5")
    chosen, parts, batch = first_batch(loop)
    assert loop.federation.config.gate.start == start
    spread = weights_of(chosen, parts, batch.x).std(0)
    assert (spread.max() < 1e-6) == (start == "even")


EXTRACTORS = {"pfedmoe__extractors": 2, "gate__weights": "equal"}
VARIANT = ("--pfedmoe.extractors", "2", "--gate.routing", "top1", "--gate.input", "shared", "--rounds", "3")


def test_variants_give_the_same_bits_on_other_ranks(tmp_path: Path) -> None:
    digests, gates = set(), []
    for ranks in (1, 3):
        run_to_end(ranks, *SMALL_RUN, *VARIANT, "--run.dir", str(ranks), cwd=tmp_path)
        digests.add(checkpoint_digest(tmp_path / str(ranks), 3))
        gates.append([row["gate"] for row in read_metrics(tmp_path / str(ranks))])
    assert len(digests) == 1
    assert gates[0] == gates[1] and max(gates[0][-1]["disagreement"]) > 0
