"""DP-SGD: the gradients of single samples, their clipping, the noise, and Poisson batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pfedmoe_mpi.algorithms.base import Spec
from pfedmoe_mpi.core import batches, seeds
from pfedmoe_mpi.core.batches import Batch, Normalise, Split
from pfedmoe_mpi.core.parts import Module, Parts
from pfedmoe_mpi.core.sample_step import SamplePrivacy
from pfedmoe_mpi.core.sgd import Phase
from support.one_client import BOTH, CPU, SPLIT, Player, Two, phase

SGD = {"momentum": 0.0}


def smooth() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


class Smooth(Two):
    """As `Two`, without what mixes samples."""

    def state(self) -> Spec:
        return {"shared": Module("smooth", smooth)}

    def client_state(self, client: int) -> Spec:
        return {"own": Module("linear", lambda: nn.Linear(5, 3))}


def player(*phases: Phase, privacy: SamplePrivacy | None, **train: Any) -> Player:
    made = Player(*phases, method=Smooth, **train)
    made.engine = replace(made.engine, samples=privacy)
    return made


def gradients_by_loop(made: Player, names: Sequence[str]) -> list[Tensor]:
    """Return each sample's gradient over these parts, (25, size) by part, by a backward pass for each."""
    parts = made.turn().parts
    parts.train(names)
    rows: list[list[Tensor]] = []
    for i in range(len(SPLIT)):
        loss = made.method.loss(parts, Batch(SPLIT.x[i : i + 1], SPLIT.y[i : i + 1], torch.tensor([i])))
        found = torch.autograd.grad(loss, [p for name in names for p in parts.parameters(name)])
        sizes = [len(parts.parameters(name)) for name in names]
        split = torch.utils._pytree.tree_map(lambda g: g.flatten(), list(found))
        by_part = [torch.cat(split[sum(sizes[:n]) : sum(sizes[: n + 1])]) for n in range(len(sizes))]
        rows.append(by_part)
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def moved(made: Player) -> tuple[Tensor, Tensor]:
    """Return how far a client step moves the shared and the private part."""
    _, shared, own = made.step()
    return shared - made.state, own - made.client.vector


def test_a_step_is_the_sum_of_clipped_gradients() -> None:
    names = ["shared", "own"]
    for apart, clip in ((frozenset[str](), 1.4), (frozenset({"own"}), 0.9)):
        privacy = SamplePrivacy(clip, 0.0, apart=apart)
        made = player(phase(BOTH, **SGD), privacy=privacy, batch=25)
        shared, own = gradients_by_loop(made, names)
        both = torch.cat([shared, own], 1)
        of_shared, of_own = (shared, own) if apart else (both, both)
        assert (both.norm(dim=1) > 1.4).any() and (both.norm(dim=1) < 1.4).any(), "some are clipped, some not"
        for change, gradient, whole, rate in zip(
            moved(made), (shared, own), (of_shared, of_own), BOTH.values(), strict=True
        ):
            factors = (clip / whole.norm(dim=1, keepdim=True)).clamp(max=1)
            torch.testing.assert_close(change, -rate * (gradient * factors).mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("train", [{}, {"accumulate": 2}, {"optimiser": "adam"}])
def test_without_noise_and_with_a_large_clip_it_is_the_plain_step(train: dict[str, Any]) -> None:
    settings = {"epochs": 2, "decay": 0.01, "clip": 1.0, **train}
    plain = player(phase(BOTH, **settings), privacy=None, **train).step()
    found = player(phase(BOTH, **settings), privacy=SamplePrivacy(1e6, 0.0), **train).step()
    assert found[0].measured_loss == pytest.approx(plain[0].measured_loss, rel=1e-5)
    for one, two in zip(found[1:], plain[1:], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("poisson", [False, True])
def test_the_noise_has_the_variance_of_the_formula_and_an_address(poisson: bool) -> None:
    made = player(phase(BOTH, **SGD), privacy=SamplePrivacy(0.5, 3.0, poisson), batch=25)
    silent = player(phase(BOTH, **SGD), privacy=SamplePrivacy(0.5, 0.0, poisson), batch=25)
    quiet = torch.cat([silent.step()[1] / 0.1, silent.step()[2] / 0.03])
    draws = []
    for round in range(1, 201):
        _, shared, own = made.step(round)
        draws.append(torch.cat([shared / 0.1, own / 0.03]) - quiet)
    noise = torch.stack(draws)  # the batch is the same in every round: all samples
    deviation = 3.0 * 0.5 / 25
    assert float(noise.std()) == pytest.approx(deviation, rel=0.01), f"{noise.numel()} draws"
    assert float(noise.mean().abs()) < 5 * deviation / noise.numel() ** 0.5
    assert torch.equal(made.step(7)[1], made.step(7)[1]) and not torch.equal(made.step(7)[1], made.step(8)[1])
    first = made.step(7)[1]
    made.client = replace(made.client, id=1)
    assert not torch.allclose(made.step(7)[1], first, atol=1e-3), "each client has noise of its own"
    neighbours = torch.corrcoef(noise[:, ::12].T).fill_diagonal_(0)
    assert float(neighbours.abs().max()) < 0.45, "each number has noise of its own"


def test_poisson_draws_every_sample_of_an_update_independently() -> None:
    generator = torch.Generator().manual_seed(3)
    split = Split(torch.arange(40.0)[:, None], torch.zeros(40, dtype=torch.int64))
    normalise = Normalise((), (), 1, CPU)
    groups = list(batches.poisson(split, 3000, 10, 4, normalise, (), generator))
    assert len(groups) == 3000 and all(len(batch) <= 4 for group in groups for batch in group)
    drawn = torch.zeros(3000, 40)
    for update, group in enumerate(groups):
        for batch in group:
            assert torch.equal(batch.x[:, 0].long(), batch.rows)
            drawn[update, batch.rows] += 1
    assert float(drawn.max()) == 1, "at most once in an update"
    assert drawn.mean(0).sub(0.25).abs().max() < 5 * (0.25 * 0.75 / 3000) ** 0.5
    assert float(drawn.sum(1).var()) == pytest.approx(40 * 0.25 * 0.75, rel=0.1), "sizes are binomial"


def test_a_poisson_step_divides_by_the_expected_size_and_survives_empty_batches() -> None:
    settings = {"batch": 2, "steps": 40}
    made = player(
        Phase({"own": 0.1}, 1, 0.0, 0.0, 0.0, steps=40), privacy=SamplePrivacy(1e6, 0.0, True), **settings
    )
    turn, _, own = made.step()
    assert math.isfinite(turn.measured_loss) and not torch.equal(own, made.client.vector)
    few = player(
        Phase({"own": 0.1}, 1, 0.0, 0.0, 0.0, steps=1), privacy=SamplePrivacy(1e6, 1e-9, True), **settings
    )
    losses = [few.step(round)[0].measured_loss for round in range(1, 60)]
    empty = sum(math.isnan(loss) for loss in losses)
    assert 1 <= empty <= 20, "e^-2 of updates have no sample; they have no loss, and are no error"

    # The loss is that of the last epoch, whatever number of samples it drew.
    of_epochs = []
    for epochs in range(1, 4):
        still = player(phase({"own": 0.0}, epochs=epochs), privacy=SamplePrivacy(1.0, 0.0, True), batch=12)
        of_epochs.append(still.step()[0].measured_loss)
    draw = seeds.torch_generator(4, "batches", 1, 0)
    parts = still.turn().parts
    for found in of_epochs:
        rows = (torch.rand((3, 25), generator=draw) < 12 / 25).nonzero()[:, 1]
        drawn = Batch(SPLIT.x[rows], SPLIT.y[rows], rows)
        assert found == pytest.approx(float(still.method.loss(parts, drawn).detach()), rel=1e-5)

    # Sums are divided by B, not by the number of samples that were drawn.
    once = Phase({"own": 1.0}, 1, 0.0, 0.0, 0.0, steps=1)
    made = player(once, privacy=SamplePrivacy(1e6, 0.0, True), batch=12)
    (gradients,) = gradients_by_loop(made, ["own"])
    for round in (2, 3):
        draw = seeds.torch_generator(4, "batches", round, 0)
        rows = torch.rand((1, 25), generator=draw)[0] < 12 / 25
        assert int(rows.sum()) != 12
        change = made.step(round)[2] - made.client.vector
        torch.testing.assert_close(change, -gradients[rows].sum(0) / 12, rtol=1e-4, atol=1e-6)


def test_a_loss_sees_other_parameters_only_while_it_is_asked() -> None:
    parts: Parts = player(phase(BOTH), privacy=None).turn().parts
    before = parts.own.weight
    values = {"own": [torch.ones_like(p) for p in parts.parameters("own")]}
    with pytest.raises(ZeroDivisionError):
        parts.with_parameters(values, lambda: torch.tensor(1 / 0))
    seen = parts.with_parameters(values, lambda: parts.own.weight.sum() + parts.parameters("own")[1].sum())
    assert float(seen) == 15 + 3 and parts.own.weight is before and parts.parameters("own")[0] is before
    parts.check()
