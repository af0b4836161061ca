"""What rank 0 sends to the other ranks before round 1."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pfedmoe_mpi import config
from pfedmoe_mpi.data import Dataset, Partition
from pfedmoe_mpi.data.dataset import MemoryRows
from pfedmoe_mpi.data.sources.open import open_dataset
from pfedmoe_mpi.federation.effective import effective_config
from pfedmoe_mpi.federation.memory import Host
from pfedmoe_mpi.federation.plan import Plan, make_plan


@pytest.fixture(scope="module")
def digits() -> Dataset:
    settings = config.build({"clients": 4})
    return open_dataset(settings.data, settings.seed, clients=settings.clients)


def plan(dataset: Dataset) -> Plan:
    settings = effective_config(config.build({"clients": 4, "model.pool": "mlp5"}), dataset, 1)
    return make_plan(settings, dataset, Host())


def test_plan_without_a_fit_repeats_no_data(digits: Dataset) -> None:
    assert plan(digits).fitted is None and plan(digits).without_rows().fitted is None


def test_plan_with_a_fit_has_everything_except_the_rows(digits: Dataset) -> None:
    def fit(data: Dataset, partition: Partition) -> Dataset:
        rows = partition.train[0]
        return replace(data, name=f"fitted to {len(rows)} rows")

    made = plan(replace(digits, fit=fit))
    sent = made.without_rows()
    assert made.fitted and sent.fitted
    assert made.fitted.name == sent.fitted.name == f"fitted to {len(made.partition.train[0])} rows"
    assert made.fitted.rows(np.arange(2)).shape == (2, 1, 32, 32)
    assert isinstance(sent.fitted.store, MemoryRows) and not len(sent.fitted.store.x)
    assert np.array_equal(sent.fitted.labels, digits.labels) and sent.costs == made.costs
