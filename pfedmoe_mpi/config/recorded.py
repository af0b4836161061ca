"""What a setting means that a run did not record yet: what the program did then, not today's default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# By section, settings that came later with what their absence means. Never changes with a default.
LATER: dict[str, dict[str, Any]] = {
    "model": {"train": "all", "lora_rank": 4, "lora_alpha": 4.0, "keep_outputs": True, "start": "own"},
    "gate": {"start": "paper"},
    "pfedmoe": {"mixture": "mean"},
}
# A run's config.toml sets all settings; these have always been among them, and are in no other file together.
ALWAYS = ("dir", "force", "singleton", "timeout")


def is_recorded(tree: Mapping[str, Any]) -> bool:
    """Return whether a tree of settings is one that a run wrote into its folder."""
    run = tree.get("run")
    return isinstance(run, Mapping) and all(name in run for name in ALWAYS)


def complete(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run with those of `LATER` that its sections do not have."""
    completed = dict(tree)
    for section, later in LATER.items():
        values = tree.get(section)
        if isinstance(values, Mapping):
            completed[section] = {**later, **values}
    return completed


def with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's settings, by dotted names, with those that came later at their defaults.

    So a restart reads them, too; those of `LATER` must be there. Settings of a file of the user's own stay as
    they are.
    """
    from pfedmoe_mpi.config import config  # which imports this module

    sections = {*config.Config.model_fields, config.methods.name(settings["algorithm"])}
    known = {n: field.default for n, field in config.fields().items() if n.partition(".")[0] in sections}
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}
    return {**defaults, **settings}


def without_later(tree: Mapping[str, Any], section: str) -> dict[str, Any] | None:
    """Return a section without the settings that mean what their absence does; None without the section."""
    values, later = tree.get(section), LATER.get(section, {})
    return values and {name: value for name, value in values.items() if later.get(name, ...) != value}
