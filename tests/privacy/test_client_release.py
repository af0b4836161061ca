"""Clipped updates with discrete Gaussian noise: distribution, norms, and the variance of released means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pfedmoe_mpi.algorithms.base import Block, Task
from pfedmoe_mpi.core.fixedpoint import SCALE, NotFiniteError
from pfedmoe_mpi.federation.round_sum import RoundSum
from pfedmoe_mpi.privacy import discrete_gaussian
from pfedmoe_mpi.privacy.client_release import ClientRelease, length

MADE = {"train_loss": 1.0, "accuracy_before": 1.0, "bytes_down": 0}
PAYLOAD = {"one": Block(40, weight="one"), "two": Block(5, rows=2, weight="one")}
STATE = {name: torch.linspace(-3, 3, block.rows * block.size) for name, block in PAYLOAD.items()}


def task(samples: int = 50) -> Task:
    counts = np.full((4, 2), samples, np.int64)
    return Task(None, (1,), 2, counts, ("mlp1",), "mlp1", 4)  # type: ignore[arg-type]


def release(noise: float = 0.0, clip: float = 0.5, expected: float = 2.5, round: int = 1) -> ClientRelease:
    return ClientRelease(clip, noise, expected, 7, round, PAYLOAD, STATE)


def moved(by: float) -> dict[str, torch.Tensor]:
    return {name: state + by for name, state in STATE.items()}


# Noise


@pytest.mark.parametrize(("sigma", "size", "margin"), [(0.7, 200_000, 2.0**-36), (3.3, 4_000, 1.0)])
def test_integers_have_the_probabilities_of_the_discrete_gaussian(
    sigma: float, size: int, margin: float
) -> None:
    found = discrete_gaussian.sample(sigma, size, np.random.default_rng(3), margin)
    k = np.arange(-40, 41)
    share = np.exp(-(k**2) / (2 * sigma**2))
    expected = size * share / share.sum()
    frequent = expected > 8
    observed = np.array([(found == each).sum() for each in k])
    chi_square = float((np.square(observed - expected) / np.maximum(expected, 1e-9))[frequent].sum())
    freedom = int(frequent.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)
    assert found.dtype == np.int64 and len(found) == size


def test_large_integers_have_the_moments_of_a_gaussian() -> None:
    found = discrete_gaussian.sample(1e11, 300_000, np.random.default_rng(4)) / 1e11
    assert abs(found.mean()) < 5 / math.sqrt(300_000)
    assert abs(found.var() - 1) < 5 * math.sqrt(2 / 300_000)
    assert abs(float((found**4).mean()) - 3) < 5 * math.sqrt(96 / 300_000)


def test_the_discrete_gaussian_is_as_close_to_the_rounded_one_as_the_refusal_of_small_noise_assumes() -> None:
    for sigma in (2.0, 4.0, 8.0):
        k = np.arange(-200, 201)
        discrete = np.exp(-(k**2) / (2 * sigma**2))
        edge = [math.erf((each - 0.5) / sigma / math.sqrt(2)) for each in [*k, k[-1] + 1]]
        distance = np.abs(discrete / discrete.sum() - np.diff(edge) / 2).sum() / 2
        assert distance <= 1 / (40 * sigma**2)


# Clipping


@pytest.mark.parametrize("by", [0.01, 0.5, 1e4])
def test_a_contribution_has_at_most_the_norm_of_the_clip_over_all_blocks(by: float) -> None:
    pieces = release().encode(moved(by))
    joined = [int(number) for _, numbers in pieces.values() for number in numbers.ravel()]
    norm = math.isqrt(sum(number * number for number in joined))  # of whole numbers, exact
    longest = length(0.5, 2.5)
    whole = by * math.sqrt(50) * 2.0**SCALE / 2.5
    assert norm <= longest
    assert norm == pytest.approx(min(whole, longest), rel=1e-6)
    assert len({*np.sign(joined)}) == 1, "the direction is kept"


def test_an_update_is_clipped_as_it_is() -> None:
    payload = {"one": Block(40, weight="one", update=True)}
    made = ClientRelease(1e3, 0.0, 1.0, 7, 1, payload, STATE)
    ((_, numbers),) = made.encode({"one": torch.full((40,), 0.25)}).values()
    assert made.mean("one", torch.from_numpy(numbers).view(1, 40)).value.tolist() == [
        pytest.approx([0.25] * 40, rel=1e-6)
    ]


def test_a_value_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NotFiniteError):
        release().encode({**moved(0.1), "two": torch.full((10,), float("nan"))})


# Means


def summed(made: ClientRelease, members: int, by: float) -> RoundSum:
    total = RoundSum(task(), [(k, "client") for k in range(members)], PAYLOAD, made)
    for position in range(members):
        total.add(position, moved(by), MADE)
    return total


def test_members_weigh_equally_over_a_denominator_that_no_client_moves() -> None:
    for members in (0, 1, 4):
        means = summed(release(clip=100.0, expected=2.5), members, 0.5).means()
        for name, mean in means.items():
            assert mean.weight.gt(0).all()
            expected = STATE[name] + 0.5 * members / 2.5
            torch.testing.assert_close(mean.value.view(-1), expected)


def test_noise_of_a_released_mean_has_the_variance_of_the_formula() -> None:
    clip, noise, expected, rounds = 0.5, 1.5, 2.5, 1000
    found = {name: [] for name in PAYLOAD}  # type: dict[str, list[torch.Tensor]]
    for round in range(rounds):
        total = summed(release(noise, clip, expected, round), 2, 0.01)
        for name, mean in total.means().items():
            found[name].append(mean.value.double().view(-1) - STATE[name].double() - 0.01 * 2 / expected)
    values = torch.cat([torch.stack(each, 1) for each in found.values()])  # (50, rounds)
    variance = (noise * clip / expected) ** 2
    count = values.numel()
    assert abs(float(values.square().mean()) / variance - 1) < 5 * math.sqrt(2 / count)
    assert abs(float(values.mean())) < 5 * math.sqrt(variance / count)
    correlation = np.corrcoef(values.numpy())[~np.eye(len(values), dtype=bool)]
    assert np.abs(correlation).max() < 6 / math.sqrt(rounds), "numbers and blocks have noise of their own"


def test_noise_repeats_and_an_empty_cohort_has_it_too() -> None:
    first, again, later = (summed(release(1.0, round=round), 0, 0.0).means() for round in (1, 1, 2))
    for name in PAYLOAD:
        assert torch.equal(first[name].value, again[name].value)
        assert not torch.equal(first[name].value, later[name].value)
        assert not torch.equal(first[name].value.view(-1), STATE[name])
    assert not summed(release(1.0), 0, 0.0).empty
    assert RoundSum(task(), [], PAYLOAD).empty
