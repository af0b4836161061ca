"""Rounds of the program against rounds written by hand from the papers' equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor

from oracles import methods
from support.small_federation import TRAINED, Played

ALL = frozenset({0, 1, 2})
SEEDS = (0, 3, 4)  # of cohorts of two, the first is clients 0 and 1, the second clients 1 and 2
VARIANTS: dict[str, dict[str, Any]] = {
    "some": {},  # two of three clients in a round
    "all": {"participation": 1.0, "train.clip": 0.5, "train.schedule": "cosine", "train.weight_decay": 0.01},
    "one": {"participation": 0.3, "train.momentum": 0.0, "train.clip": 0.0},
}


def agree(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert found and set(found) == set(expected), what
    for name, tensor in found.items():
        np.testing.assert_allclose(
            tensor.numpy(), expected[name].numpy(), rtol=1e-5, atol=1e-5, err_msg=f"{what} {name}"
        )


def same_measures(it: Played, history: list[methods.Round], clients: frozenset[int]) -> None:
    """Accuracies, losses and their means in the rows are those of the rounds by hand."""
    method = it.loop.federation.config.algorithm
    for row, record in zip(it.loop.history, history, strict=True):
        known = {k: v for k, v in enumerate(row["clients"]["accuracy_before"]) if v is not None}
        assert known == record.before, f"before aggregation, round {row['round']}"
        for k in clients:
            assert row["clients"]["accuracy"][k] == record.after[k], (
                f"after aggregation, round {row['round']}"
            )
            assert row["clients"]["loss"][k] == pytest.approx(record.test_loss[k], rel=1e-4, abs=1e-5)
        if clients == ALL:
            assert row["accuracy"]["mean"] == pytest.approx(np.mean(list(record.after.values())))
        if record.before:
            assert row["accuracy_cohort"]["mean"] == pytest.approx(np.mean(list(record.before.values())))
        if method != "scaffold" and record.train_loss:
            n = [TRAINED[k] for k in record.train_loss]
            assert row["train_loss"] == pytest.approx(
                np.average(list(record.train_loss.values()), weights=n), rel=1e-4
            )
