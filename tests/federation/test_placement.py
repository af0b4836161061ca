"""Which rank keeps and which trains each client: balanced, the same on all ranks, at home if possible."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from pfedmoe_mpi.federation.placement import homes, trainers


def loads(costs: dict[int, float], place: dict[int, int], ranks: int) -> list[float]:
    return [sum(costs[client] for client in place if place[client] == rank) for rank in range(ranks)]


def optimum(costs: list[float], ranks: int) -> float:
    """Return the least possible maximum load, by trying all placements."""
    return min(
        max(sum(c for c, rank in zip(costs, choice, strict=True) if rank == r) for r in range(ranks))
        for choice in product(range(ranks), repeat=len(costs))
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_homes_are_within_a_third_of_the_optimum(ranks: int) -> None:
    draw = np.random.default_rng(ranks)
    for _ in range(25):
        costs = draw.integers(1, 100, 7).astype(float).tolist()
        home = homes(costs, ranks)
        longest = max(loads(dict(enumerate(costs)), dict(enumerate(home)), ranks))
        assert longest <= (4 / 3 - 1 / (3 * ranks)) * optimum(costs, ranks) + 1e-9
    assert homes([3, 3, 2, 2, 2], 2) == [0, 1, 0, 1, 0], "the worst case of this order"


def test_homes_are_balanced_and_repeat() -> None:
    draw = np.random.default_rng(0)
    costs = draw.lognormal(0, 1, 300).tolist()
    for ranks in (1, 2, 7, 16):
        home = homes(costs, ranks)
        assert home == homes(list(costs), ranks) and len(home) == 300 and set(home) == set(range(ranks))
        load = loads(dict(enumerate(costs)), dict(enumerate(home)), ranks)
        assert max(load) <= 1.05 * sum(costs) / ranks or max(load) == max(costs)
    assert sorted(homes([1.0] * 20, 16)) == sorted([*range(16), *range(4)]), "equal clients are spread evenly"
    assert len(set(homes([5.0, 1.0, 2.0], 16))) == 3, "more ranks than clients"
    assert homes([], 4) == []


def test_every_client_is_trained_once_within_the_bound() -> None:
    draw = np.random.default_rng(1)
    for _ in range(300):
        ranks, clients = int(draw.integers(1, 9)), int(draw.integers(1, 40))
        costs = draw.lognormal(0, 1, clients).tolist()
        home = homes(costs, ranks)
        cohort = draw.choice(clients, int(draw.integers(1, clients + 1)), replace=False).tolist()
        chosen = {client: costs[client] for client in cohort}
        place = trainers(chosen, home, ranks)
        assert place == trainers(dict(reversed(chosen.items())), home, ranks), "the order does not matter"
        assert place.keys() == chosen.keys() and set(place.values()) <= set(range(ranks))
        load = loads(chosen, place, ranks)
        mean, largest = sum(chosen.values()) / ranks, max(chosen.values())
        assert max(load) <= mean + largest + 1e-9
        at_home = max(loads(chosen, {client: home[client] for client in chosen}, ranks))
        assert max(load) <= at_home + 1e-9, "moving never lengthens a round"
        if at_home <= max(mean, largest):
            assert all(place[client] == home[client] for client in chosen), "nobody moves without need"


def test_full_cohort_stays_mostly_at_home() -> None:
    home = homes([1.0] * 20, 4)
    assert trainers(dict.fromkeys(range(20), 1.0), home, 4) == dict(enumerate(home))


def test_cohort_of_one_home_is_spread() -> None:
    place = trainers(dict.fromkeys((0, 1, 2, 3), 1.0), [2, 2, 2, 2], 4)
    assert sorted(place.values()) == [0, 1, 2, 3] and place[0] == 2
    unlike = trainers({0: 4.0, 1: 2.0, 2: 1.0, 3: 1.0}, [0, 0, 0, 0], 2)
    assert loads({0: 4.0, 1: 2.0, 2: 1.0, 3: 1.0}, unlike, 2) == [4.0, 4.0]


def test_empty_cohort_and_idle_ranks_are_placed() -> None:
    assert trainers({}, [0, 1], 2) == {}
    assert trainers({5: 3.0}, [0] * 5 + [9], 16) == {5: 9}
    assert len(set(trainers(dict.fromkeys(range(3), 1.0), [0, 0, 0], 16).values())) == 3
