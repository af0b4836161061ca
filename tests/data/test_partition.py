"""Properties of every partition, properties of each kind, and impossible partitions."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from pfedmoe_mpi.config.partition_settings import PartitionSettings
from pfedmoe_mpi.data import Partition, make_partition
from pfedmoe_mpi.errors import PartitionError


def labels_of(rows: int, classes: int, seed: int = 0) -> np.ndarray:
    """Return labels (rows,) of classes of different sizes, all present."""
    generator = np.random.default_rng(seed)
    drawn = generator.choice(classes, rows - classes, p=generator.dirichlet(np.full(classes, 20.0)))
    return generator.permutation(np.concatenate([drawn, np.arange(classes)]))


def settings_of(**values: Any) -> PartitionSettings:
    return PartitionSettings.model_validate({"min_samples": 4, **values})


def dealt(partition: Partition) -> np.ndarray:
    """Return all rows of all parts."""
    return np.concatenate([*partition.train, *partition.validation, *partition.test])


def rows_of(partition: Partition, client: int) -> np.ndarray:
    return np.concatenate([part[client] for part in (partition.train, partition.validation, partition.test)])


def class_table(partition: Partition, labels: np.ndarray, classes: int) -> np.ndarray:
    """Return all samples per client and class."""
    every = range(partition.clients)
    return np.stack([np.bincount(labels[rows_of(partition, k)], minlength=classes) for k in every])


KINDS: list[dict[str, Any]] = [
    {"kind": "iid"},
    {"kind": "pathological", "classes": 2},
    {"kind": "pathological", "classes": 3, "validation": 0.25},
    {"kind": "dirichlet", "alpha": 1.0},
    {"kind": "dirichlet", "alpha": 0.1, "test_fraction": 0.5},
    {"kind": "dirichlet", "alpha": 0.01, "validation": 0.1},
    {"kind": "classes", "classes_min": 2, "classes": 6},
    {"kind": "natural"},
]
SIZES = [(600, 10, 7), (2000, 10, 40), (3000, 37, 25), (61, 2, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("values", KINDS, ids=lambda values: "-".join(map(str, values.values())))
@pytest.mark.parametrize("pool", ["all", "official"])
def test_every_partition_keeps_the_general_properties(
    values: dict[str, Any], size: tuple[int, int, int], pool: str
) -> None:
    rows, classes, clients = size
    if values.get("classes", 0) > classes:
        pytest.skip("more classes per client than classes")
    settings = settings_of(**values, pool=pool)
    for seed in range(3):
        labels = labels_of(rows, classes, seed)
        official = np.random.default_rng(seed).random(rows) < 0.3 if pool == "official" else None
        natural = np.arange(rows) % clients
        partition = make_partition(
            settings, labels, classes, clients, seed, client=natural, official_test=official
        )
        taken = dealt(partition)
        assert len(np.unique(taken)) == len(taken), "a row is dealt twice"
        assert partition.clients == clients == len(partition.test) == len(partition.validation)
        check_coverage(settings, labels, taken, clients, classes)
        for client in range(clients):
            check_client(settings, partition, client, official)
        again = make_partition(
            settings, labels, classes, clients, seed, client=natural, official_test=official
        )
        assert again.digest() == partition.digest()


def check_coverage(
    settings: PartitionSettings, labels: np.ndarray, taken: np.ndarray, clients: int, classes: int
) -> None:
    """Check that every row is assigned, unless the clients together cannot hold all classes."""
    if settings.kind == "pathological" and settings.classes * clients < classes:
        assert len(np.unique(labels[taken])) == settings.classes * clients
    elif settings.kind != "classes" or settings.classes_min * clients >= classes:
        assert len(taken) == len(labels)


def check_client(
    settings: PartitionSettings, partition: Partition, client: int, official: np.ndarray | None
) -> None:
    train, validation, test = (
        part[client] for part in (partition.train, partition.validation, partition.test)
    )
    for rows in (train, validation, test):
        assert rows.dtype == np.int64 and (np.diff(rows) > 0).all()
    total = len(train) + len(validation) + len(test)
    assert total >= settings.min_samples and len(train) and len(test)
    if official is None:
        assert abs(len(test) - total * settings.test_fraction) <= 0.5 or len(test) == 1
    else:
        assert official[test].all() and not official[train].any() and not official[validation].any()
    kept = len(train) + len(validation)
    if settings.validation and kept > 1:
        assert abs(len(validation) - kept * settings.validation) <= 0.5 or len(validation) == 1
    else:
        assert not len(validation)


@pytest.mark.parametrize("values", KINDS[:-1], ids=lambda values: "-".join(map(str, values.values())))
def test_seed_changes_the_partition(values: dict[str, Any]) -> None:
    labels = labels_of(1000, 10)
    digests = {make_partition(settings_of(**values), labels, 10, 10, seed).digest() for seed in range(4)}
    assert len(digests) == 4


def test_digest_depends_on_the_place_of_a_row() -> None:
    """One row moved from a client's end to the next one's start leaves the same bytes in the same order."""
    none = (np.array([], np.int64),) * 2
    one = Partition((np.array([1, 2]), np.array([3])), none, none)
    other = Partition((np.array([1]), np.array([2, 3])), none, none)
    moved = Partition(none, (np.array([1, 2]), np.array([3])), none)
    assert len({one.digest(), other.digest(), moved.digest()}) == 3


def test_partition_is_the_same_on_every_machine() -> None:
    """Changing these bits would make every older checkpoint unusable."""
    labels = np.arange(500) % 10
    digest = make_partition(PartitionSettings(), labels, 10, 5, 0).digest()
    assert digest == "86e58677ae3b268202475fd575eb679cc657438b79b7fcb36cfb713a9cad163a"


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_test_rows_are_stratified(fraction: float) -> None:
    labels = labels_of(3000, 10)
    partition = make_partition(settings_of(kind="dirichlet", test_fraction=fraction), labels, 10, 12, 0)
    for client in range(12):
        count = np.bincount(labels[rows_of(partition, client)], minlength=10)
        test = np.bincount(labels[partition.test[client]], minlength=10)
        assert (np.abs(test - count * fraction) <= 1).all()


def test_small_clients_together_test_on_all_classes() -> None:
    """Each client has one row of each class: which two are test rows is drawn, not the lowest labels."""
    labels = np.arange(2000) % 10
    client = np.arange(2000) // 10
    partition = make_partition(settings_of(kind="natural"), labels, 10, 200, 0, client=client)
    tested = np.bincount(labels[np.concatenate(partition.test)], minlength=10)
    assert tested.sum() == 400 and tested.min() > 15


def test_class_of_one_row_gives_it_last() -> None:
    """Of 3.2, 0.4 and 0.4 rows the remainders favour the classes of one row; training needs these more."""
    labels = np.array([0] * 8 + [1, 2])
    for seed in range(20):
        partition = make_partition(settings_of(kind="iid", test_fraction=0.4), labels, 3, 1, seed)
        assert labels[partition.test[0]].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_smallest_clients_have_train_and_test_rows(fraction: float) -> None:
    settings = settings_of(kind="iid", test_fraction=fraction, validation=0.9, min_samples=2)
    partition = make_partition(settings, np.arange(60) % 10, 10, 30, 0)
    assert [len(rows) for rows in (*partition.train, *partition.test)] == [1] * 60


def test_counts_are_of_training_rows() -> None:
    labels = labels_of(300, 5)
    partition = make_partition(settings_of(kind="iid", validation=0.2), labels, 5, 3, 0)
    counts = partition.counts(labels, 5)
    assert counts.shape == (3, 5)
    for client, rows in enumerate(partition.train):
        assert counts[client].tolist() == [int((labels[rows] == label).sum()) for label in range(5)]


@pytest.mark.parametrize(
    ("clients", "each", "classes"), [(10, 2, 10), (50, 2, 10), (7, 3, 10), (9, 10, 10), (3, 2, 10)]
)
def test_pathological_clients_have_few_classes(clients: int, each: int, classes: int) -> None:
    labels = np.arange(5000) % classes
    for seed in range(5):
        settings = settings_of(kind="pathological", classes=each)
        table = class_table(make_partition(settings, labels, classes, clients, seed), labels, classes)
        assert ((table > 0).sum(axis=1) == each).all()
        holders = (table > 0).sum(axis=0)
        assert holders.sum() == clients * each and holders.max() - holders.min() <= 1
        for label in np.flatnonzero(holders):
            shares = table[:, label][table[:, label] > 0] / (labels == label).sum()
            assert shares.sum() == pytest.approx(1)
            assert shares.max() / shares.min() <= 0.6 / 0.4 * 1.1, "shares are from U(0.4, 0.6)"
        if holders.max() > 1:
            assert table[table > 0].std() > 0, "shares are drawn, not equal"


def test_pathological_pairs_are_drawn() -> None:
    """Over seeds a class is paired with every other one, not just its neighbour."""
    labels = np.arange(500) % 10
    pairs = set()
    for seed in range(40):
        partition = make_partition(settings_of(kind="pathological"), labels, 10, 10, seed)
        pairs |= {tuple(np.flatnonzero(row)) for row in class_table(partition, labels, 10)}
    assert len(pairs) == 45


def test_class_with_one_client_more_is_drawn() -> None:
    labels = np.arange(500) % 10
    more = set()
    for seed in range(60):
        partition = make_partition(settings_of(kind="pathological", classes=3), labels, 10, 7, seed)
        more.add(int((class_table(partition, labels, 10) > 0).sum(axis=0).argmax()))
    assert len(more) == 10


def test_class_with_a_row_per_client_is_enough() -> None:
    labels = np.arange(500) % 10
    partition = make_partition(settings_of(kind="pathological", classes=10, tries=1), labels, 10, 50, 0)
    assert (class_table(partition, labels, 10) == 1).all()


def test_classes_per_client_are_drawn_within_bounds() -> None:
    labels = np.arange(6000) % 10
    seen = set()
    for seed in range(5):
        settings = settings_of(kind="classes", classes_min=3, classes=6)
        table = class_table(make_partition(settings, labels, 10, 30, seed), labels, 10)
        numbers = (table > 0).sum(axis=1)
        assert numbers.min() >= 3 and numbers.max() <= 6 and (table.sum(axis=0) == 600).all()
        seen |= set(numbers.tolist())
    assert seen == {3, 4, 5, 6}


def test_dirichlet_alpha_controls_concentration() -> None:
    """Small alpha: few classes each; large alpha: near the whole's proportions; sizes alike at both ends."""
    labels = np.arange(20_000) % 10
    largest = {}
    for alpha in (0.01, 1.0, 1000.0):
        table = class_table(make_partition(settings_of(alpha=alpha), labels, 10, 100, 0), labels, 10)
        largest[alpha] = float((table.max(axis=1) / table.sum(axis=1)).mean())
        assert table.sum(axis=1).max() < 5 * table.sum(axis=1).min()
    assert largest[0.01] > 0.9 and 0.2 < largest[1.0] < 0.5 and largest[1000.0] < 0.13


def test_dirichlet_shares_have_mean_and_variance() -> None:
    """Class shares of a client follow Dirichlet(alpha): mean 1/c, variance (1/c)(1 - 1/c)/(alpha c + 1)."""
    labels = np.arange(100_000) % 5
    table = class_table(make_partition(settings_of(alpha=2.0), labels, 5, 400, 0), labels, 5)
    shares = table / table.sum(axis=1, keepdims=True)
    assert shares.var() == pytest.approx(0.2 * 0.8 / 11, rel=0.1)


def test_dirichlet_loses_no_class_at_small_alpha() -> None:
    """At this alpha most proportions are 0 in float64; no class is lost for it."""
    for seed in range(5):
        partition = make_partition(settings_of(alpha=1e-4), np.arange(600) % 10, 10, 3, seed)
        assert len(dealt(partition)) == 600


def test_iid_parts_are_equal() -> None:
    table = class_table(
        make_partition(settings_of(kind="iid"), np.arange(1003) % 10, 10, 10, 0), np.arange(1003) % 10, 10
    )
    assert sorted(table.sum(axis=1).tolist()) == [100] * 7 + [101] * 3
    assert table.std() > 0 and table.min() > 0


def test_official_pools_have_the_same_proportions() -> None:
    labels = np.arange(12_000) % 10
    official = np.arange(12_000) >= 10_000
    for kind in ("dirichlet", "pathological", "classes"):
        settings = settings_of(kind=kind, pool="official", classes=4)
        partition = make_partition(settings, labels, 10, 10, 0, official_test=official)
        for client in range(10):
            train = np.bincount(labels[partition.train[client]], minlength=10)
            test = np.bincount(labels[partition.test[client]], minlength=10)
            assert (np.abs(train / 5 - test) <= 2).all()


def test_pool_all_mixes_official_rows() -> None:
    official = np.arange(1000) >= 800
    partition = make_partition(settings_of(), np.arange(1000) % 10, 10, 5, 0, official_test=official)
    assert official[np.concatenate(partition.train)].any() and len(dealt(partition)) == 1000


def test_natural_keeps_clients_and_their_own_test_rows() -> None:
    labels, client = np.arange(600) % 3, np.random.default_rng(0).integers(0, 5, 600)
    official = np.random.default_rng(1).random(600) < 0.25
    partition = make_partition(
        settings_of(kind="natural"), labels, 3, 5, 0, client=client, official_test=official
    )
    split = make_partition(settings_of(kind="natural"), labels, 3, 5, 0, client=client)
    for number in range(5):
        mine = np.flatnonzero(client == number)
        assert np.array_equal(np.sort(rows_of(partition, number)), mine)
        assert np.array_equal(partition.test[number], mine[official[mine]])
        assert np.array_equal(np.sort(rows_of(split, number)), mine)


IMPOSSIBLE: list[tuple[dict[str, Any], int, int, str]] = [
    ({"kind": "iid"}, 300, 100, r"need 400 rows, but the data have 300(.|\n)*--clients 75"),
    (
        {"kind": "pathological", "classes": 11},
        500,
        5,
        r"11, but the data have 10 classes(.|\n)*--partition.classes 10",
    ),
    ({"kind": "classes", "classes": 11}, 500, 5, "the data have 10 classes"),
    (
        {"kind": "pathological", "classes": 10},
        500,
        60,
        r"class \d has 50 rows for 60 clients(.|\n)*--clients \(now 60\)",
    ),
    (
        {"kind": "dirichlet", "alpha": 0.01, "min_samples": 45},
        500,
        10,
        r"fewer than partition.min_samples = 45(.|\n)*--partition.alpha \(now 0.01\)",
    ),
    ({"kind": "dirichlet", "pool": "official"}, 500, 5, "official training and test rows(.|\n)*pool all"),
    ({"kind": "natural"}, 500, 5, "name the client of every row(.|\n)*--partition.kind"),
]


@pytest.mark.parametrize(("values", "rows", "clients", "pattern"), IMPOSSIBLE)
def test_impossible_partitions_are_refused(
    values: dict[str, Any], rows: int, clients: int, pattern: str
) -> None:
    settings = settings_of(**{"min_samples": 4, **values})
    with pytest.raises(PartitionError, match=pattern) as caught:
        make_partition(settings, np.arange(rows) % 10, 10, clients, 0)
    assert "remedy: " in str(caught.value)


def test_unusable_natural_clients_are_refused() -> None:
    labels, client = np.arange(500) % 10, np.arange(500) % 5
    settings = settings_of(kind="natural")
    with pytest.raises(
        PartitionError, match=r"clients = 6, but the data have 5 natural clients(.|\n)*--clients 5"
    ):
        make_partition(settings, labels, 10, 6, 0, client=client)
    with pytest.raises(PartitionError, match=r"client 5 has 3 rows(.|\n)*--partition.min_samples 3"):
        make_partition(settings, labels, 10, 6, 0, client=np.where(np.arange(500) < 3, 5, client))
    with pytest.raises(PartitionError, match="client 2 has no test rows"):
        make_partition(settings, labels, 10, 5, 0, client=client, official_test=client < 2)


def test_too_few_official_test_rows_are_refused() -> None:
    official = np.arange(500) >= 495
    for kind in ("iid", "dirichlet", "pathological"):
        with pytest.raises(PartitionError, match=r"--partition\.pool all"):
            make_partition(
                settings_of(kind=kind, pool="official", tries=5),
                np.arange(500) % 10,
                10,
                20,
                0,
                official_test=official,
            )


@pytest.mark.parametrize(
    "values",
    [{"kind": "dirichlet", "alpha": 1e-4}, {"kind": "classes", "classes": 10}, {"kind": "pathological"}],
)
def test_impossible_partition_of_many_clients_fails_soon(values: dict[str, Any]) -> None:
    """60,000 rows, 1,000 clients, no draw that fits: a message, and soon."""
    start = time.perf_counter()
    with pytest.raises(PartitionError, match=r"partition.tries = 100 .*(.|\n)*--clients \(now 1000\)"):
        make_partition(settings_of(**values, min_samples=60), np.arange(60_000) % 10, 10, 1000, 0)
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize("values", KINDS[:-2], ids=lambda values: "-".join(map(str, values.values())))
def test_partition_of_a_thousand_clients_is_quick(values: dict[str, Any]) -> None:
    start = time.perf_counter()
    partition = make_partition(settings_of(**values), np.arange(60_000) % 10, 10, 1000, 0)
    assert time.perf_counter() - start < 10 and len(dealt(partition)) == 60_000


def test_more_draws_find_a_rare_partition() -> None:
    """A later draw finds a partition that the first one misses; without later draws it is missed."""
    labels = labels_of(400, 10)
    found = {"one": 0, "many": 0}
    for seed in range(10):
        for name, tries in (("one", 1), ("many", 200)):
            try:
                settings = settings_of(kind="dirichlet", alpha=0.3, min_samples=22, tries=tries)
                partition = make_partition(settings, labels, 10, 10, seed)
                assert min(len(rows_of(partition, k)) for k in range(10)) >= 22
                found[name] += 1
            except PartitionError:
                pass
    assert found["one"] < found["many"] == 10
