"""pFedMoE's mixture: what the gate weighs, and that every part of it is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from oracles import nets
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
    return write_data_files(tmp_path_factory.mktemp("pfedmoe"))


def test_gradients_reach_theta_omega_and_phi(data: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loop = build_loop(data["small"], "pfedmoe", model__pool="mlp5", gate__start="paper")
    found = loss_gradients(loop)
    assert {name.partition("/")[0] for name in found} == {"shared", "model", "gate"}
    constants = {
        "gate/input_norm.bias",
        "gate/layers.0.bias",
        "gate/layers.3.bias",
    }  # BatchNorm takes them out
    assert not [name for name, largest in found.items() if largest < 1e-6 and name not in constants], found
    kind = type(loop.federation.method)
    attached = kind._alpha
    monkeypatch.setattr(kind, "_alpha", lambda self, *arguments: attached(self, *arguments).detach())
    found = loss_gradients(loop)
    assert {name.partition("/")[0] for name, largest in found.items() if largest == 0} == {"gate"}


@pytest.mark.parametrize(("column", "alone", "silent"), [(0, "shared", "model"), (1, "model", "shared")])
def test_gate_columns_select_the_shared_and_the_local_extractor(
    data: dict[str, Path], column: int, alone: str, silent: str
) -> None:
    """With all weight on one column the prediction is head ∘ that extractor, whatever the other one is."""
    loop = build_loop(data["small"], "pfedmoe", model__pool="mlp5", pfedmoe__mixture="mean")
    method, parts, batch = first_batch(loop)
    last = parts.gate.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([200.0, -200.0] if column == 0 else [-200.0, 200.0]))
    for module in parts.modules().values():
        module.eval()
    extractor = {"shared": parts.shared, "model": parts.model.extractor}
    with torch.no_grad():
        alpha = weights_of(method, parts, batch.x)
        assert torch.equal(alpha[:, column], torch.ones(16)) and torch.equal(
            alpha[:, 1 - column], torch.zeros(16)
        )
        logits = method.predict(parts, batch.x)
        assert torch.allclose(logits, parts.model.head(extractor[alone](batch.x)), atol=1e-6)
        extractor[silent].fc1.weight.mul_(-3.0)
        assert torch.equal(method.predict(parts, batch.x), logits)
        extractor[alone].fc1.weight.mul_(-3.0)
        assert not torch.allclose(method.predict(parts, batch.x), logits, atol=1e-3)


def test_mean_alpha_in_metrics_is_the_shared_column(data: dict[str, Path]) -> None:
    it = train_federation(data["small"], "pfedmoe", model__pool="mlp5", rounds=1)
    for k in range(3):
        gate = nets.gate(it.of_client(k, "gate", start=False)).eval()
        with torch.no_grad():
            alpha = gate(it.samples[k].test[0])[:, 0].mean()
        assert it.loop.history[0]["clients"]["alpha"][k] == pytest.approx(float(alpha), abs=1e-5)
