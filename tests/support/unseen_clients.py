"""A federation of twelve clients, four of which never train."""

from __future__ import annotations

from typing import Any

from pfedmoe_mpi import config
from pfedmoe_mpi.federation import build, federation
from pfedmoe_mpi.mpi import launch

SETTINGS = {
    "data.source": "synthetic",
    "data.samples": 400,
    "data.size": 8,
    "data.classes": 6,
    "partition.kind": "pathological",
    "clients": 12,
    "unseen.clients": 4,
    "rounds": 2,
    "model.dim": 12,
    "train.device": "cpu",
}
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]


def build_federation(**changes: Any) -> federation.Federation:
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return build.build(launch.start(), config.build({**SETTINGS, **dotted}))
