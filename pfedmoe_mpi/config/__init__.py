"""Every setting with its range, default and reason; which methods exist, read without importing them.

The names below are those of `config/config.py`, imported on first use: listing the methods needs no pydantic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pfedmoe_mpi.config.config import (
        Config,
        build,
        changed,
        choices,
        fields,
        flatten,
        given,
        located,
        read_toml,
        references,
        relocated,
        to_toml,
        to_tree,
    )

__all__ = [
    "Config",
    "build",
    "changed",
    "choices",
    "fields",
    "flatten",
    "given",
    "located",
    "read_toml",
    "references",
    "relocated",
    "to_toml",
    "to_tree",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pfedmoe_mpi.config import config

    return getattr(config, name)
