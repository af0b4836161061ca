"""Fixtures of the tests of models."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    torch.manual_seed(7)
