"""The effective configuration: what the data propose, and every `auto` replaced by what it stands for."""

from __future__ import annotations

from pfedmoe_mpi import config
from pfedmoe_mpi.algorithms import base
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.data import Dataset
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models import names as model_names


def with_proposals(settings: Config, dataset: Dataset) -> Config:
    """The settings with what the data propose wherever the user gave nothing."""
    changes = {name: value for name, value in dataset.proposals.items() if not config.given(settings, name)}
    return config.changed(settings, changes) if changes else settings


def effective_config(settings: Config, dataset: Dataset, threads: int) -> Config:
    """The effective configuration: every `auto` replaced by what it stands for on these data."""
    settings = with_proposals(settings, dataset)
    kind = base.load(settings.algorithm)
    if settings.unseen.private == "average" and not kind.averages_private:
        problem = f"{settings.algorithm} has nothing private that unseen.private could average"
        raise ConfigError(problem, "leave --unseen.private out, or take --algorithm pfedmoe")
    if settings.train.augment and len(dataset.shape) != 3:
        given = ",".join(settings.train.augment)
        raise ConfigError(f"train.augment {given} is for images, and these samples are none", "leave it out")
    model = settings.model
    pool: tuple[str, ...] = tuple(model_names.resolve_name(name) for name in model.pool if name != "auto")
    shared = (
        model_names.auto_shared(dataset.shape, pool, dataset.tokens)
        if model.shared == "auto"
        else model_names.resolve_name(model.shared)
    )
    if model.pool == ("auto",):
        unlike = model_names.auto_pool(dataset.shape, dataset.tokens, shared)
        pool = (shared,) if kind.homogeneous else unlike
    if len(pool) < len(model.pool):
        raise ConfigError("model.pool = auto stands alone", "name architectures, or leave model.pool out")
    if kind.homogeneous and len(set(pool)) > 1:
        raise ConfigError(
            f"{settings.algorithm} needs equal models, but model.pool has {', '.join(pool)}",
            f"--model.pool auto takes model.shared ({shared}) for all; --model.pool {pool[0]} another one",
        )
    dim = model_names.resolve_dim([*pool, shared], model.dim)
    flat = config.flatten(config.to_tree(settings))
    return config.build(
        {**flat, "model.pool": pool, "model.shared": shared, "model.dim": dim, "train.threads": threads}
    )
