"""The splits of other papers and libraries, and for every kind that no client is tested on another's rows."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest

from pfedmoe_mpi.config.partition_settings import PartitionSettings
from pfedmoe_mpi.data import Partition, make_partition
from pfedmoe_mpi.data.shares import draw_shares
from pfedmoe_mpi.errors import PartitionError

CLASS, FREE = {"kind": "dirichlet_class", "alpha": 0.3}, {"balance": False}
NEW: list[dict[str, Any]] = [
    {**CLASS},
    {**CLASS, **FREE, "validation": 0.2},
    {"kind": "quantity", "alpha": 0.5},
    {"kind": "shards"},
    {"kind": "shards", "shards": 3, "validation": 0.1},
]
OLD: list[dict[str, Any]] = [
    *({"kind": kind} for kind in ("iid", "pathological", "dirichlet", "natural")),
    {"kind": "classes", "classes": 6},
]


def split(values: dict[str, Any], labels: np.ndarray, clients: int, seed: int = 0, **data: Any) -> Partition:
    settings = PartitionSettings.model_validate({"min_samples": 4, "tries": 1000, **values})
    return make_partition(settings, labels, int(labels.max()) + 1, clients, seed, **data)


def table(partition: Partition, labels: np.ndarray) -> np.ndarray:
    """Return all samples per client and class."""
    parts = zip(partition.train, partition.validation, partition.test, strict=True)
    return np.stack([np.bincount(labels[np.concatenate(p)], minlength=labels.max() + 1) for p in parts])


def test_every_kind_is_tested_here() -> None:
    kinds = get_args(PartitionSettings.model_fields["kind"].annotation)
    assert {values["kind"] for values in (*NEW, *OLD)} == {*kinds} - {"file"}, "a file has its own tests"


@pytest.mark.parametrize("pool", ["all", "official"])
@pytest.mark.parametrize("values", [*NEW, *OLD], ids=lambda values: "-".join(map(str, values.values())))
def test_no_client_is_tested_on_a_row_that_trains(values: dict[str, Any], pool: str) -> None:
    labels = np.random.default_rng(1).permutation(np.arange(2003) % 7)
    official = np.random.default_rng(2).random(2003) < 0.3
    clients = np.arange(2003) % 12
    for seed in range(3):
        data = {"client": clients, "official_test": official}
        made = split({**values, "pool": pool}, labels, 12, seed, **data)
        train, validation, test = (np.concatenate(part) for part in (made.train, made.validation, made.test))
        assert not np.isin(test, train).any() and not np.isin(test, validation).any()
        assert len(np.unique(np.concatenate([train, validation, test]))) == 2003, "every row has one place"
        assert all(map(len, made.train)) and all(map(len, made.test))
        if pool == "official":
            assert official[test].all() and not official[train].any()


@pytest.mark.parametrize("values", NEW, ids=lambda values: "-".join(map(str, values.values())))
def test_split_repeats_and_depends_on_the_seed(values: dict[str, Any]) -> None:
    labels = np.arange(1500) % 10
    digests = [split(values, labels, 10, seed).digest() for seed in (0, 1, 2, 0)]
    assert len(set(digests)) == 3 and digests[0] == digests[3]


def test_bits_of_the_splits_are_the_same_everywhere() -> None:
    """Changing these bits would make every older checkpoint unusable."""
    labels = np.arange(500) % 10
    digests = [split(values, labels, 5).digest()[:8] for values in NEW]
    assert digests == ["056a5ea6", "bd83d728", "7d86216f", "228253d9", "f0f88a81"]


def variation(values: dict[str, Any], labels: np.ndarray, clients: int) -> tuple[float, float]:
    """Return the mean over 20 seeds of std / mean of the clients' sizes, and of their numbers of classes."""
    tables = [table(split(values, labels, clients, seed), labels) for seed in range(20)]
    return (
        float(np.mean([counts.sum(axis=1).std() / counts.sum(axis=1).mean() for counts in tables])),
        float(np.mean([(counts > 0).sum(axis=1).mean() for counts in tables])),
    )


def test_class_draws_agree_with_the_libraries() -> None:
    """The expected numbers are those of PFLlib's and FL-bench's own code on these labels, over 100 seeds.

    The clients' numbers of classes are theirs without the last client, which gets stray rows there.
    """
    labels = np.arange(60_000) % 10
    pfllib = variation({**CLASS, "alpha": 0.1, "min_samples": 40}, labels, 20)
    assert pfllib == (pytest.approx(0.575, abs=0.06), pytest.approx(4.79, abs=0.3))
    fl_bench = variation({**CLASS, **FREE, "alpha": 0.1, "min_samples": 10}, labels, 20)
    assert fl_bench == (pytest.approx(0.798, abs=0.09), pytest.approx(5.78, abs=0.3))


def test_clients_that_are_full_get_no_further_class() -> None:
    labels = np.arange(5000) % 10
    for seed in range(5):
        counts = table(split(CLASS, labels, 20, seed), labels)
        before = np.cumsum(counts, axis=1) - counts
        assert not counts[before > 251].any(), "an equal share is 250 rows, apart from rounding"
        free = table(split({**CLASS, **FREE}, labels, 20, seed), labels)
        assert free[np.cumsum(free, axis=1) - free > 251].any()


@pytest.mark.parametrize("balance", [True, False])
def test_no_row_is_lost_at_small_alpha(balance: bool) -> None:
    """Nearly all proportions are 0 in float64, those of all clients that are not full included."""
    labels = np.arange(900) % 3
    values = {"kind": "dirichlet_class", "alpha": 1e-4, "balance": balance, "tries": 5000, "min_samples": 2}
    assert table(split(values, labels, 3), labels).sum() == 900


def test_shares_are_proportions_whoever_is_full() -> None:
    """At small alpha all clients that are not full may have 0; reserved rows may empty a class."""
    settings = PartitionSettings(kind="dirichlet_class", alpha=1e-4)
    for sizes, clients in (([300, 300, 300], 3), ([5, 0], 1)):
        for seed in range(20):
            shares = draw_shares(settings, np.array(sizes), clients, np.random.default_rng(seed))
            assert np.allclose(shares.sum(axis=1), 1) and (shares >= 0).all()


def test_quantity_has_drawn_sizes_and_all_classes() -> None:
    """Sizes follow Dirichlet(alpha): variance of a share (1/N)(1 - 1/N)/(alpha N + 1)."""
    labels = np.arange(50_000) % 5
    tables = [
        table(split({"kind": "quantity", "alpha": 2.0}, labels, 20, seed), labels) for seed in range(20)
    ]
    shares = np.concatenate([counts.sum(axis=1) for counts in tables]) / 50_000
    assert shares.var() == pytest.approx(0.05 * 0.95 / 41, rel=0.2)
    for counts in tables:
        big = counts[counts.sum(axis=1) > 1000]
        assert (abs(big / big.sum(axis=1, keepdims=True) - 0.2) < 0.07).all()


def test_shards_are_pieces_of_the_sorted_rows() -> None:
    labels = np.random.default_rng(0).permutation(np.arange(6000) % 10)
    counts = table(split({"kind": "shards"}, labels, 100), labels)
    assert (counts.sum(axis=1) == 60).all() and set(np.unique(counts)) == {0, 30, 60}, "no shard is divided"
    numbers = (counts > 0).sum(axis=1)
    assert numbers.max() == 2 and (numbers == 2).sum() > 80, "most clients have two classes"
    uneven = table(split({"kind": "shards", "shards": 3}, labels[:5003], 7), labels[:5003])
    assert uneven.sum() == 5003 and np.ptp(uneven.sum(axis=1)) <= 3


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        ({"kind": "shards", "shards": 30}, r"need 600 rows(.|\n)*--partition.shards 26"),
        ({"kind": "shards", "shards": 3, "min_samples": 26}, r"2\d rows(.|\n)*--partition.shards \(now 3\)"),
        ({**CLASS, "min_samples": 24, "tries": 3}, r"tries = 3 (.|\n)*--partition.tries \(now 3\)"),
        (
            {"kind": "quantity", "min_samples": 24, "tries": 3},
            r"tries = 3 (.|\n)*--partition.alpha \(now 1\)",
        ),
    ],
)
def test_impossible_splits_name_their_settings(values: dict[str, Any], pattern: str) -> None:
    with pytest.raises(PartitionError, match=pattern):
        split(values, np.arange(520) % 10, 20)
