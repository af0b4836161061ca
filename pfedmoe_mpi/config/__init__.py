"""Every setting with its range, default and reason; which methods exist, read without importing them."""

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
    "to_toml",
    "to_tree",
]
