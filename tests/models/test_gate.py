"""The gate and its normalisation: the papers' definitions, their options and their gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pfedmoe_mpi.models.gate import Gate
from pfedmoe_mpi.models.switchnorm import SwitchNorm

# SwitchNorm


def switchnorm(features: int) -> SwitchNorm:
    """Return a SwitchNorm whose parameters all differ from their initial values."""
    norm = SwitchNorm(features)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
        norm.mean_weight.copy_(torch.tensor([0.3, 1.1]))
        norm.var_weight.copy_(torch.tensor([1.4, -0.2]))
    return norm


def reference_switchnorm(norm: SwitchNorm, x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """Compute Luo et al., section 2, in float64; `mean` and `var` are the batch's."""
    values = {name: tensor.detach().double().numpy() for name, tensor in norm.named_parameters()}
    share = {key: np.exp(values[key]) / np.exp(values[key]).sum() for key in ("mean_weight", "var_weight")}
    result = np.empty_like(x)
    for row, sample in enumerate(x):
        centre = share["mean_weight"][0] * sample.mean() + share["mean_weight"][1] * mean
        spread = share["var_weight"][0] * sample.var() + share["var_weight"][1] * var
        result[row] = (sample - centre) / np.sqrt(spread + 1e-5) * values["weight"] + values["bias"]
    return result


@pytest.mark.parametrize(("samples", "features", "far"), [(6, 4, 0.0), (128, 3072, 0.0), (33, 13, 1000.0)])
def test_switchnorm_equals_numpy(samples: int, features: int, far: float) -> None:
    """In the last case features are far from zero, where E[x²] - E[x]² loses all digits."""
    norm = switchnorm(features)
    batches = [far + torch.randn(samples, features) * torch.rand(features) for _ in range(2)]
    mean, var = np.zeros(features), np.ones(features)
    for batch in batches:
        x = batch.double().numpy()
        np.testing.assert_allclose(
            norm(batch).detach(), reference_switchnorm(norm, x, x.mean(0), x.var(0)), rtol=0, atol=2e-3
        )
        mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0, ddof=1)
    np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm.running_var, var, rtol=1e-4)
    norm.eval()
    x = batches[0].double().numpy()
    np.testing.assert_allclose(
        norm(batches[0]).detach(), reference_switchnorm(norm, x, mean, var), rtol=2e-4, atol=2e-4
    )
    np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-5, atol=1e-6)  # evaluation moves nothing


@pytest.mark.parametrize("training", [True, False])
def test_switchnorm_gradients_are_correct(training: bool) -> None:
    norm = switchnorm(4).double().train(training)
    keys = [name for name, _ in norm.named_parameters()]

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.func.functional_call(norm, dict(zip(keys, values, strict=True)), (x,))
        return result

    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *norm.parameters()))


def test_switchnorm_handles_edge_cases() -> None:
    norm = SwitchNorm(3)
    with pytest.raises(ValueError, match="two samples"):
        norm(torch.zeros(1, 3))
    assert norm.eval()(torch.ones(1, 3)).isfinite().all()
    constant = SwitchNorm(3)(torch.ones(4, 3))  # neither statistic varies
    assert constant.isfinite().all()
    x = torch.randn(16, 3).bfloat16()
    assert torch.equal(SwitchNorm(3)(x), SwitchNorm(3)(x.float()))  # computed in float32


# The gate


@pytest.mark.parametrize("input_norm", ["switch", "layer", "batch", "none"])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ["sigmoid", "relu", "tanh", "gelu"])
@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (2, 2), (3, 5)])
def test_gate_options_are_applied(
    input_norm: str, batch_norm: bool, activation: str, layers: int, experts: int
) -> None:
    options = {"layers": layers, "input_norm": input_norm, "batch_norm": batch_norm, "activation": activation}
    gate = Gate(12, experts, hidden=7, **options)  # type: ignore[arg-type]
    kinds = [type(part) for part in gate.modules()]
    assert kinds.count(nn.Linear) == layers
    assert kinds.count(nn.BatchNorm1d) == layers * batch_norm + (input_norm == "batch")
    assert kinds.count(SwitchNorm) == (input_norm == "switch")
    assert kinds.count(nn.LayerNorm) == (input_norm == "layer")
    active = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}[activation]
    assert kinds.count(active) == layers - 1

    x = torch.randn(2, 3, 2, 2)
    weights = gate(x)
    assert weights.shape == (2, experts)
    assert torch.allclose(weights.sum(1), torch.ones(2))
    weights[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in gate.parameters())
    one = gate.eval()(x[:1])
    assert torch.allclose(one, gate(x)[:1], atol=1e-6)  # in evaluation a sample does not see the others
    assert torch.allclose(one.sum(1), torch.ones(1))


def test_gate_defaults_are_those_of_the_paper() -> None:
    gate = Gate(3072)
    assert list(map(type, gate.layers)) == [nn.Linear, nn.BatchNorm1d, nn.Sigmoid, nn.Linear, nn.BatchNorm1d]
    assert isinstance(gate.input_norm, SwitchNorm)
    assert gate(torch.randn(2, 3, 32, 32)).shape == (2, 2)


def test_gate_weights_follow_the_samples() -> None:
    gate = Gate(12)
    x = torch.randn(8, 3, 2, 2)
    order = torch.randperm(8)
    torch.testing.assert_close(gate(x)[order], gate(x[order]))  # training: statistics do not know the order
    torch.testing.assert_close(gate(x), gate(x.contiguous(memory_format=torch.channels_last)))


def test_gate_weights_are_float32_under_autocast() -> None:
    gate = Gate(12)
    with torch.autocast("cpu", torch.bfloat16):
        weights = gate(torch.randn(8, 12))
    assert weights.dtype == torch.float32
    assert torch.allclose(weights.sum(1), torch.ones(8), atol=1e-6)
    weights[:, 0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in gate.parameters())


def test_gate_is_not_saturated_in_evaluation_after_one_epoch() -> None:
    """It weighs samples as in training, and running statistics that have not converged do not saturate it."""
    gate = Gate(64)
    for _ in range(10):
        batch = 3 + 5 * torch.randn(32, 64)
        trained = gate(batch)[:, 0].detach()
    evaluated = gate.eval()(batch)[:, 0].detach()
    assert torch.corrcoef(torch.stack([trained, evaluated]))[0, 1] > 0.9
    assert evaluated.min() > 0.05 and evaluated.max() < 0.95 and evaluated.std() > 0.01


@pytest.mark.parametrize("input_norm", ["switch", "layer", "batch", "none"])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_even_start_has_equal_weights_and_learns(input_norm: str, batch_norm: bool, layers: int) -> None:
    """All else is drawn as with `paper`, whose weights differ from sample to sample before the first step."""
    options = {"layers": layers, "input_norm": input_norm, "batch_norm": batch_norm}
    gates = []
    for start in ("paper", "even"):
        torch.manual_seed(3)
        gates.append(Gate(12, 3, hidden=7, start=start, **options))  # type: ignore[arg-type]
    drawn, even = gates
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
    weights = even(x)
    assert torch.equal(weights, torch.full((64, 3), 1 / 3))
    assert drawn(x)[:, 0].std() > (0.1 if batch_norm else 0.001)
    last = tuple(f"layers.{len(even.layers) - 1}.{name}" for name in ("weight", "bias"))
    before = dict(drawn.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in even.named_parameters() if name not in last)
    (weights[:, 0] * x[:, 0]).sum().backward()
    gradient = even.layers[-1].weight.grad
    assert gradient is not None and gradient.abs().max() > 1e-3
    torch.optim.SGD(even.parameters(), 0.1).step()
    assert even(x)[:, 0].std() > 1e-4


def test_published_gate_starts_as_a_random_router() -> None:
    """Its normalisation gives the logits variance 1, whatever was drawn."""
    x = torch.randn(512, 3072, generator=torch.Generator().manual_seed(1))
    assert Gate(3072)(x)[:, 0].std().item() == pytest.approx(0.27, abs=0.04)
