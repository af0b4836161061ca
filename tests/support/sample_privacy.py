"""Federations that train by DP-SGD."""

from __future__ import annotations

from typing import Any

from pfedmoe_mpi.conformance.checks import Case
from pfedmoe_mpi.federation import build
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.mpi import launch

SAMPLE: dict[str, Any] = {
    "privacy.unit": "sample",
    "privacy.clip": 1.0,
    "gate.input_norm": "layer",
    "gate.batch_norm": False,
    "apfl.adaptive": False,
    "train.device": "cpu",
}


def built(algorithm: str, **changes: Any) -> Federation:
    """Return a small federation of a method on this process."""
    return build.build(launch.start(), Case(algorithm, SAMPLE).settings(**changes), warn=False)
