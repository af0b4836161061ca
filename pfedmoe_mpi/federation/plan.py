"""The plan that rank 0 makes for all ranks before round 1: partition, fitted data, checked models, costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pfedmoe_mpi import algorithms
from pfedmoe_mpi.algorithms.base import Task
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.data import Dataset, Partition, make_partition
from pfedmoe_mpi.data.set_apart import MIN_RESERVED, choose_unseen, reserve_rows
from pfedmoe_mpi.data.split_file import Split, read_split
from pfedmoe_mpi.errors import PartitionError
from pfedmoe_mpi.federation import memory
from pfedmoe_mpi.federation.costs import client_costs
from pfedmoe_mpi.models import registry, trained, user_model
from pfedmoe_mpi.models.gate import input_shape
from pfedmoe_mpi.models.names import EMBEDDING


@dataclass(frozen=True)
class Plan:
    """The partition, the data fitted to its training rows, and the relative cost of every client."""

    partition: Partition
    fitted: Dataset | None  # None: the data need no fit, and every rank knows them already
    costs: list[float]

    def without_rows(self) -> Plan:
        """Return the plan without the samples, which the other ranks do not need."""
        return replace(self, fitted=self.fitted.without_rows()) if self.fitted else self


def make_plan(settings: Config, dataset: Dataset, host: memory.Host) -> Plan:
    """Draw the partition, fit the data to it, check the models and estimate each client's cost.

    Args:
        host: what rank 0's host has to hold.

    Raises:
        PartitionError: no partition fits the settings.
        ConfigError: an architecture cannot take the data, or the models do not fit into memory.
    """
    partition = draw_partition(settings, dataset)
    fitted = dataset.fitted(partition) if dataset.fit else None
    task = make_task(settings, fitted or dataset, partition)
    check_models(task)
    memory.check(task, algorithms.load(settings.algorithm)(task), host)
    return Plan(partition, fitted, client_costs(task))


def draw_partition(settings: Config, dataset: Dataset) -> Partition:
    """Return the partition; a pure function of settings, labels and `partition.file`.

    Raises:
        DataError: `partition.file` cannot be read.
        PartitionError: no partition fits the settings; every row has a class of its own; a client would get a
            single training row, which has no variance for batch normalisation; or reserved rows would overlap
            clients' test rows.
    """
    if dataset.classes == len(dataset) and not dataset.ordered:
        raise PartitionError(
            f"{dataset.name}: every row has a class of its own, and no class has rows to train and to test",
            "label rows by their classes, not by row numbers; in a CSV file the label is the first column",
        )

    split = read_split(Path(settings.partition.file)) if settings.partition.file else None

    def partition_of(rows: np.ndarray) -> Partition:
        return make_partition(
            settings.partition,
            dataset.labels[rows],
            dataset.classes,
            settings.clients,
            settings.seed,
            client=None if dataset.client is None else dataset.client[rows],
            official_test=None if dataset.official_test is None else dataset.official_test[rows],
            ordered=dataset.ordered,
            split=split,
        )

    share = algorithms.load(settings.algorithm).reserve(settings)
    if share and dataset.ordered:
        raise PartitionError(
            f"algorithm = {settings.method} reserves rows for the server, and they would overlap the "
            "windows that clients are tested on",
            "--fedjets.common FILE needs no reserved rows; or choose another --algorithm or other data",
        )
    if split:
        partition = _with_listed(settings, partition_of(np.arange(len(dataset))), split, share)
    else:
        partition = reserve_rows(len(dataset.labels), share, settings.seed, partition_of)
    if settings.partition.kind == "natural":
        partition = replace(partition, client_names=dataset.client_names)
    if settings.unseen_clients and not partition.unseen:
        wanted, by = settings.unseen_clients, settings.unseen.by
        partition = choose_unseen(partition, dataset.labels, wanted, settings.seed, by)
    partition.check()
    fewest = int(partition.train.sizes.argmin())
    if len(partition.train[fewest]) < 2:
        raise PartitionError(
            f"client {fewest} has 1 training row, and training needs at least 2",
            "raise --partition.min_samples, or lower --clients, --partition.test_fraction or "
            "--partition.validation",
        )
    return partition


def _with_listed(settings: Config, partition: Partition, split: Split, share: float) -> Partition:
    """Return the partition with the clients that never train in the split's file.

    Args:
        share: of all rows, that the method reserves for the server.

    Raises:
        PartitionError: the settings say another number of such clients, or the method reserves rows and the
            file does not.
    """
    if split.unseen and settings.unseen_clients != len(split.unseen):
        raise PartitionError(
            f"unseen.clients = {settings.unseen.clients:g}, but partition.file = {split.path} lists "
            f"{len(split.unseen)} clients that never train",
            "remove --unseen.clients",
        )
    if share and len(split.reserved) < MIN_RESERVED:
        raise PartitionError(
            f"algorithm = {settings.method} reserves rows for the server, and partition.file = {split.path} "
            f"lists {len(split.reserved)} such rows, fewer than {MIN_RESERVED}",
            f"write it with: data partition OUT.h5 --algorithm {settings.method}; --fedjets.common FILE "
            "needs no reserved rows",
        )
    return replace(partition, unseen=split.unseen)


def make_task(settings: Config, dataset: Dataset, partition: Partition) -> Task:
    """Return what methods may know of the data and the partition."""
    counts = partition.counts(dataset.labels, dataset.classes)
    model = settings.model
    return Task(
        *(settings, dataset.shape, dataset.classes, counts, model.pool, model.shared, model.dim),
        unseen=partition.unseen,
        late=_late(settings, partition),
        vocabulary=dataset.vocabulary,
    )


def _late(settings: Config, partition: Partition) -> frozenset[int]:
    """Draw the clients that join late: floor(share · n + ½) of the n clients that train."""
    train = [client for client in range(partition.clients) if client not in partition.unseen]
    number = int(settings.join.share * len(train) + 0.5)
    late = seeds.numpy_generator(settings.seed, "late").choice(train, number, replace=False)
    return frozenset(late.tolist())


def check_models(task: Task) -> None:
    """Raise ConfigError for an architecture or a gate of the user's own that cannot take the data."""
    for name in dict.fromkeys([*task.pool, task.shared]):
        sizes = (task.classes, task.dim, task.config.model.stem, task.vocabulary)
        registry.check_model(name, task.shape, *sizes)
        trained.check(task.extractor(name).skeleton, task.config.model.train, name)
    gate = task.config.gate
    if gate.module and gate.weights == "sample":
        shape = (EMBEDDING,) if task.vocabulary else task.shape
        user_model.check(gate.module, input_shape(shape, task.dim, gate.input), 2)
