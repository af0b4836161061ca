"""The effective configuration: the data's proposals applied, and every `auto` replaced by its value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfedmoe_mpi import algorithms, config
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.data import Dataset
from pfedmoe_mpi.data.split_file import read_split
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models import names as model_names

# The kinds of partition that these settings belong to.
KINDS = {
    "partition.alpha": "dirichlet",
    "partition.balance": "dirichlet_class",
    "partition.shards": "shards",
    "partition.classes": "pathological",
    "partition.classes_min": "classes",
}


def proposals(dataset: Dataset, kind: str) -> dict[str, Any]:
    """Return the settings that the data propose; the natural `kind` of partition has as many clients as they.

    Args:
        kind: `partition.kind`, unless the data propose another.
    """
    proposed = dict(dataset.proposals)
    if kind == "file":
        proposed.pop("clients", None)
    if kind == "natural" and dataset.client is not None:
        proposed.setdefault("clients", int(dataset.client.max()) + 1)
    return proposed


def apply_proposals(settings: Config, dataset: Dataset) -> Config:
    """Return the settings with the data's proposals, where the user gave no value.

    Raises:
        ConfigError: the data propose the natural partition, but the user set a parameter of another kind.
    """
    kind = settings.partition.kind
    if not config.given(settings, "partition.kind"):
        kind = dataset.proposals.get("partition.kind", kind)
        for name, other in KINDS.items():
            if kind == "natural" and config.given(settings, name):
                raise ConfigError(
                    f"{name} has no effect: the data name their clients, and partition.kind is not set",
                    f"set --partition.kind {other} to divide the rows anew, or remove --{name}",
                )
    proposed = proposals(dataset, kind).items()
    changes = {name: value for name, value in proposed if not config.given(settings, name)}
    return config.changed(settings, changes) if changes else settings


def listed(settings: Config) -> dict[str, Any]:
    """Return the numbers of clients that `partition.file` lists, of those that are not given.

    Raises:
        DataError: the file cannot be read.
    """
    if not settings.partition.file:
        return {}
    split = read_split(Path(settings.partition.file))
    numbers = {"clients": split.clients, "unseen.clients": len(split.unseen)}
    return {name: n for name, n in numbers.items() if n and not config.given(settings, name)}


def with_listed(settings: Config, numbers: Mapping[str, Any] | None = None) -> Config:
    """Return the settings with these numbers, by default those that `listed` returns."""
    numbers = listed(settings) if numbers is None else numbers
    return config.changed(settings, numbers) if numbers else settings


def _check_shares(settings: Config) -> None:
    """Refuse a share of the clients that is no client, and a number of clients that is not whole.

    Raises:
        ConfigError: names the setting and the smallest share.
    """
    unseen, measured, clients = settings.unseen.clients, settings.eval.clients, settings.clients
    for name, number in (("unseen.clients", unseen), ("eval.clients", measured)):
        if number > 1 and not number.is_integer():
            raise ConfigError(
                f"{name} = {number:g}: expected a whole number of clients, or a share below 1",
                f"--{name} {round(number)}",
            )
    if measured > clients:
        raise ConfigError(
            f"eval.clients = {measured:g}, but there are {clients} clients", f"--eval.clients {clients}"
        )
    shares = (
        ("unseen.clients", unseen, clients),
        ("eval.clients", measured, clients),
        ("join.share", settings.join.share, clients - settings.unseen_clients),
        ("faults.straggler", settings.faults.straggler, clients),
    )
    for name, share, total in shares:
        if share and int(share * total + 0.5) == 0:
            raise ConfigError(
                f"{name} = {share:g} of {total} clients is less than half a client, and would have no effect",
                f"set --{name} {1 / total:.3g} or more, or remove --{name}",
            )


def effective_config(settings: Config, dataset: Dataset, threads: int) -> Config:
    """Return the effective configuration: every `auto` replaced by its value for these data.

    Raises:
        ConfigError: a setting does not fit the data or the method.
    """
    settings = apply_proposals(settings, dataset)
    _check_shares(settings)
    kind = algorithms.load(settings.algorithm)
    if settings.unseen.private == "average" and not kind.averages_private:
        problem = f"unseen.private = average, but {settings.method} has no private parts to average"
        raise ConfigError(problem, "remove --unseen.private, or choose --algorithm pfedmoe")
    if settings.train.augment and len(dataset.shape) != 3:
        augment = ",".join(settings.train.augment)
        problem = f"train.augment = {augment} needs images; the samples have shape {dataset.shape}"
        raise ConfigError(problem, "remove --train.augment")
    if settings.partition.noise and dataset.tokens:
        problem = f"partition.noise = {settings.partition.noise:g} needs images or features, not texts"
        raise ConfigError(problem, "remove --partition.noise")
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
            f"{settings.method} needs equal models, but model.pool = {','.join(pool)}",
            f"--model.pool {pool[0]} gives all clients this one, --model.pool auto gives them "
            f"model.shared = {shared}",
        )
    dim = model_names.resolve_dim([*pool, shared], model.dim)
    start = settings.gate.start
    if start == "auto":  # a gate of the user's own draws its own first weights
        start = "paper" if settings.gate.module else kind.gate_start
    flat = config.flatten(config.to_tree(settings))
    return config.build(
        {
            **{**flat, "model.pool": pool, "model.shared": shared, "model.dim": dim},
            **{"gate.start": start, "train.threads": threads},
        }
    )
