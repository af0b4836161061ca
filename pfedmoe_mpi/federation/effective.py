"""The effective configuration: the data's proposals applied, and every `auto` replaced by its value."""

from __future__ import annotations

from pfedmoe_mpi import config
from pfedmoe_mpi.algorithms import base
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.data import Dataset
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models import names as model_names


def apply_proposals(settings: Config, dataset: Dataset) -> Config:
    """Return the settings with the data's proposals, where the user gave no value."""
    changes = {name: value for name, value in dataset.proposals.items() if not config.given(settings, name)}
    return config.changed(settings, changes) if changes else settings


def effective_config(settings: Config, dataset: Dataset, threads: int) -> Config:
    """Return the effective configuration: every `auto` replaced by its value for these data.

    Raises:
        ConfigError: a setting does not fit the data or the method.
    """
    settings = apply_proposals(settings, dataset)
    kind = base.load(settings.algorithm)
    if settings.unseen.private == "average" and not kind.averages_private:
        problem = f"unseen.private = average, but {settings.algorithm} has no private parts to average"
        raise ConfigError(problem, "remove --unseen.private, or choose --algorithm pfedmoe")
    if settings.train.augment and len(dataset.shape) != 3:
        augment = ",".join(settings.train.augment)
        problem = f"train.augment = {augment} needs images; the samples have shape {dataset.shape}"
        raise ConfigError(problem, "remove --train.augment")
    model = settings.model
    pool: tuple[str, ...] = tuple(model_names.resolve_name(name) for name in model.pool if name != "auto")
    shared = (
        model_names.auto_shared(dataset.shape, pool, dataset.tokens)
        if model.shared == "auto"
        else model_names.resolve_name(model.shared)
    )
    if model.pool == ("auto",):
        different = model_names.auto_pool(dataset.shape, dataset.tokens, shared)
        pool = (shared,) if kind.homogeneous else different
    if len(pool) < len(model.pool):
        problem = f"model.pool = {','.join(model.pool)} combines auto with architectures"
        raise ConfigError(problem, "remove auto from --model.pool, or the architectures")
    if kind.homogeneous and len(set(pool)) > 1:
        raise ConfigError(
            f"{settings.algorithm} needs equal models, but model.pool = {','.join(pool)}",
            f"--model.pool {pool[0]} gives all clients this one, --model.pool auto gives them "
            f"model.shared = {shared}",
        )
    dim = model_names.resolve_dim([*pool, shared], model.dim)
    flat = config.flatten(config.to_tree(settings))
    return config.build(
        {**flat, "model.pool": pool, "model.shared": shared, "model.dim": dim, "train.threads": threads}
    )
