"""Presets: settings by one name, as TOML files in `pfedmoe_mpi/presets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pfedmoe_mpi.config import config
from pfedmoe_mpi.errors import ConfigError, either, nearest

_FOLDER = Path(__file__).parents[1] / "presets"


def names() -> list[str]:
    """Return the names of all presets, sorted."""
    return sorted(file.stem for file in _FOLDER.glob("*.toml"))


def read(name: str) -> dict[str, Any]:
    """Return the settings of a preset by their dotted names; none for an empty name.

    Raises:
        ConfigError: there is no such preset.
    """
    if not name:
        return {}
    if name not in names():
        flags = either([f"--preset {each}" for each in names()])
        raise ConfigError(f"preset = {name}: there is no such preset{nearest(name, names())}", f"use {flags}")
    return config.read_toml(_FOLDER / f"{name}.toml")
