"""From a configuration to a federation that is ready for round 1: data, partition, models, clients, device.

Everything a user can get wrong is found here, on all ranks alike, before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch

from pfedmoe_mpi import algorithms, config, device, placement, seeds
from pfedmoe_mpi.algorithms.base import Algorithm, Task
from pfedmoe_mpi.client import Client
from pfedmoe_mpi.comm import Comm
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.data import Dataset, Partition, make_partition, open_dataset
from pfedmoe_mpi.data.shard import SPLITS, Normalise, Split
from pfedmoe_mpi.data.stream import Stream
from pfedmoe_mpi.data.unseen import choose_unseen, with_reserve
from pfedmoe_mpi.device import Device
from pfedmoe_mpi.errors import ConfigError, PartitionError
from pfedmoe_mpi.flat import Layout
from pfedmoe_mpi.models import names as model_names
from pfedmoe_mpi.models import registry
from pfedmoe_mpi.models.cost import multiply_adds
from pfedmoe_mpi.parts import Workbench
from pfedmoe_mpi.training import Engine


@dataclass(frozen=True)
class Federation:
    """All that a run is made of; everything but `clients` and `device` is equal on every rank.

    `home` is the rank that keeps each client, `costs` the relative cost of training each for one epoch.
    """

    config: Config
    dataset: Dataset
    partition: Partition
    data_digest: str
    task: Task
    method: Algorithm
    workbench: Workbench
    engine: Engine
    device: Device
    home: Sequence[int]
    costs: Sequence[float]
    state_layout: Layout
    client_layouts: Sequence[Layout]
    clients: Mapping[int, Client]
    stream: Stream | None
    reserved: Client | None  # for methods with something to do before round 1: the rows no client has


def build(comm: Comm, settings: Config) -> Federation:
    """Assemble a federation; collective.

    Raises:
        UserError: on all ranks alike.
    """
    dataset = open_everywhere(comm, settings)
    threads = device.threads(comm, settings.train.threads)
    settings = resolved(settings, dataset, threads)
    chosen = device.choose(comm, settings.train)
    partition = comm.from_root(lambda: deal(settings, dataset), "partition")
    dataset = fit_everywhere(comm, dataset, partition)
    task = make_task(settings, dataset, partition)
    comm.from_root(lambda: check_models(task), "models")
    method = algorithms.load(settings.algorithm)(task)
    method.poll = comm.poll
    specs = [method.client_state(k) for k in range(task.clients)]  # all ranks alike meet what it refuses
    workbench = Workbench(settings.seed, chosen.device)
    costs = comm.from_root(lambda: client_costs(task), "costs")
    home = placement.homes(costs, comm.size)
    normalise = Normalise(dataset.mean, dataset.std, len(dataset.shape), chosen.device)
    engine = Engine(
        chosen.device,
        normalise,
        settings.train,
        settings.eval.batch,
        settings.seed,
        settings.rounds,
        comm.poll,
    )
    shards = distribute(comm, dataset, partition, home, chosen.device)
    clients = {
        k: Client(k, specs[k], pinned(workbench.initial(specs[k], k), chosen.device), shards[k])
        for k in shards
    }
    return Federation(
        config=settings,
        dataset=dataset,
        partition=partition,
        data_digest=data_digest(comm, clients),
        task=task,
        method=method,
        workbench=workbench,
        engine=engine,
        device=chosen,
        home=home,
        costs=costs,
        state_layout=workbench.layout(method.state()),
        client_layouts=[workbench.layout(spec) for spec in specs],
        clients=clients,
        stream=make_stream(settings, dataset, partition),
        reserved=reserved(comm, dataset, partition, chosen.device) if method.pretrains else None,
    )


def pinned(vector: torch.Tensor, where: torch.device) -> torch.Tensor:
    """An idle client's vector: host memory, pinned where a GPU will read it."""
    return vector.pin_memory() if where.type == "cuda" and vector.numel() else vector


def open_everywhere(comm: Comm, settings: Config) -> Dataset:
    """The data set on every rank; where rows lie in the root's memory the others know everything but rows."""
    held: list[Dataset] = []

    def describe() -> Dataset:
        held.append(open_dataset(settings.data, settings.seed, clients=settings.clients))
        return held[0].without_rows()

    def open_too() -> None:  # the root has checked the content
        if comm.rank:
            held.append(open_dataset(settings.data, settings.seed, clients=settings.clients, check=False))

    known = comm.from_root(describe, "data")
    if comm.gather(held[0].distributed if held else False, "data store")[0]:
        comm.agree(open_too, "data of all ranks")
    return held[0] if held else known


def fit_everywhere(comm: Comm, dataset: Dataset, partition: Partition) -> Dataset:
    """The data as the clients use them; what they learn from training rows is learnt once, by the root."""
    if dataset.fit is None:
        return dataset
    held: list[Dataset] = []

    def fit() -> Dataset:
        held.append(dataset.fitted(partition))
        return held[0].without_rows()

    known = comm.from_root(fit, "fitting the data")
    return held[0] if held else known


def proposed(settings: Config, dataset: Dataset) -> Config:
    """The settings with what the data propose wherever the user gave nothing."""
    changes = {name: value for name, value in dataset.proposals.items() if not config.given(settings, name)}
    return config.changed(settings, changes) if changes else settings


def resolved(settings: Config, dataset: Dataset, threads: int) -> Config:
    """The effective configuration: every `auto` replaced by what it stands for on these data."""
    settings = proposed(settings, dataset)
    kind = algorithms.load(settings.algorithm)
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
        unlike = model_names.auto_pool(dataset.shape, True, dataset.tokens, shared)
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


def deal(settings: Config, dataset: Dataset) -> Partition:
    """The partition; a pure function of settings and labels.

    Raises:
        PartitionError: it cannot be met, leaves a client a single training row, of which no batch
            normalisation has a variance, or would reserve rows that overlap clients' test rows.
    """

    def dealt(rows: np.ndarray) -> Partition:
        return make_partition(
            settings.partition,
            dataset.labels[rows],
            dataset.classes,
            settings.clients,
            settings.seed,
            client=None if dataset.client is None else dataset.client[rows],
            official_test=None if dataset.official_test is None else dataset.official_test[rows],
            ordered=dataset.ordered,
        )

    share = algorithms.load(settings.algorithm).reserve(settings)
    if share and dataset.ordered:
        raise PartitionError(
            f"the rows that {settings.algorithm} reserves for the server would be drawn among windows that "
            "clients are tested on",
            "take a method that reserves none (FedJETs with --fedjets.common FILE is one), or other data",
        )
    partition = with_reserve(len(dataset.labels), share, settings.seed, dealt)
    if settings.unseen_clients:
        partition = choose_unseen(partition, dataset.labels, settings.unseen_clients, settings.seed)
    partition.check()
    fewest = min(range(partition.clients), key=lambda client: len(partition.train[client]))
    if len(partition.train[fewest]) < 2:
        raise PartitionError(
            f"client {fewest} has 1 training row, and training needs 2",
            "raise --partition.min_samples, or lower --clients, --partition.test_fraction or .validation",
        )
    return partition


def make_task(settings: Config, dataset: Dataset, partition: Partition) -> Task:
    """What methods may know."""
    counts = partition.counts(dataset.labels, dataset.classes)
    model = settings.model
    return Task(
        *(settings, dataset.shape, dataset.classes, counts, model.pool, model.shared, model.dim),
        unseen=partition.unseen,
        late=_late(settings, partition),
        vocabulary=dataset.vocabulary,
    )


def _late(settings: Config, partition: Partition) -> frozenset[int]:
    """floor(share · n + ½) of the n clients that train."""
    train = [client for client in range(partition.clients) if client not in partition.unseen]
    number = int(settings.join.share * len(train) + 0.5)
    drawn = seeds.numpy_generator(settings.seed, "late").choice(train, number, replace=False)
    return frozenset(drawn.tolist())


def make_stream(settings: Config, dataset: Dataset, partition: Partition) -> Stream | None:
    """What counts in which round, if data drift at all."""
    if settings.stream.kind == "none":
        return None
    labels = [dataset.labels[rows] for rows in partition.train]
    return Stream(settings.stream, settings.seed, labels, dataset.classes)


def check_models(task: Task) -> None:
    """Raise ConfigError for an architecture that cannot take the data."""
    for name in dict.fromkeys([*task.pool, task.shared]):
        sizes = (task.classes, task.dim, task.config.model.stem, task.vocabulary)
        registry.check_model(name, task.shape, *sizes)


def client_costs(task: Task) -> list[float]:
    """Relative cost of training each client for one epoch: its samples times its own and the shared model."""
    by_name = {name: _cost(task, name) for name in {*task.pool, task.shared}}
    shared = by_name[task.shared]
    return [task.samples(k) * (by_name[task.architecture(k)] + shared) for k in range(task.clients)]


def _cost(task: Task, name: str) -> float:
    return multiply_adds(task.extractor(name).build(), task.shape, bool(task.vocabulary))


def sample_costs(task: Task, method: Algorithm) -> list[float]:
    """Multiply-adds of one training sample forward, per client: every model and extractor that it runs.

    Heads and gates beside them are not counted: below a hundredth of a convolutional extractor.
    """
    by_kind: dict[str, float] = {}
    for name in {*task.pool, task.shared}:
        cost = _cost(task, name)
        by_kind |= {part.kind: cost for part in (task.model(name), task.extractor(name))}
    shared = sum(by_kind.get(part.kind, 0.0) for part in method.state().values())
    own = {k: method.client_state(k) for k in range(min(task.clients, len(task.pool)))}
    sums = [shared + sum(by_kind.get(part.kind, 0.0) for part in spec.values()) for spec in own.values()]
    return [sums[k % len(sums)] for k in range(task.clients)]


def distribute(
    comm: Comm, dataset: Dataset, partition: Partition, home: Sequence[int], where: torch.device
) -> dict[int, dict[str, Split]]:
    """Every client's samples on its home's device: read there, or sent by the root that holds them."""
    wanted = {
        rank: np.concatenate(
            [np.empty(0, np.int64), *_rows(partition, [k for k, r in enumerate(home) if r == rank])]
        )
        for rank in range(comm.size)
    }
    if dataset.distributed:
        own: list[np.ndarray] = []  # agree would send a result to all ranks
        comm.agree(lambda: own.append(dataset.rows(wanted[comm.rank])), "data rows")
        rows = own[0]
    else:
        rows = np.empty((len(wanted[comm.rank]), *dataset.shape), dataset.dtype)
        if comm.rank == 0:
            outgoing = {rank: dataset.rows(index) for rank, index in wanted.items()}
            rows = outgoing[0]
        else:
            outgoing = {rank: rows if rank == comm.rank else np.empty(0, np.uint8) for rank in wanted}
        comm.move([(0, rank, outgoing[rank]) for rank in range(1, comm.size)], "data rows")
    shards: dict[int, dict[str, Split]] = {}
    at = 0
    for client in (k for k, rank in enumerate(home) if rank == comm.rank):
        shards[client] = {}
        for split in SPLITS:
            index = getattr(partition, split)[client]
            shards[client][split] = Split.of(rows[at : at + len(index)], dataset.labels[index], where)
            at += len(index)
    return shards


def reserved(comm: Comm, dataset: Dataset, partition: Partition, where: torch.device) -> Client:
    """The reserved rows as a client of the server's, 8 : 2 for training and test; only rank 0 reads them."""
    rows, train = partition.reserved, partition.reserved_train
    if comm.rank:
        rows, train = rows[:0], train[:0]
    read: list[np.ndarray] = []
    comm.agree(lambda: read.append(dataset.rows(rows)), "reserved rows")
    x, y = read[0], dataset.labels[rows]
    splits = {"train": Split.of(x[train], y[train], where), "test": Split.of(x[~train], y[~train], where)}
    return Client(seeds.SERVER, {}, torch.empty(0), splits)


def _rows(partition: Partition, clients: Sequence[int]) -> list[np.ndarray]:
    return [getattr(partition, split)[client] for client in clients for split in SPLITS]


def data_digest(comm: Comm, clients: Mapping[int, Client]) -> str:
    """SHA-256 over every client's samples and labels as used, in client order."""
    own = {}
    for k, client in clients.items():
        state = sha256()
        for split in client.splits.values():
            for tensor in (split.x, split.y):
                state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                state.update(tensor.cpu().numpy().tobytes())
        own[k] = state.digest()
    all_clients: dict[int, bytes] = {}
    for part in comm.gather(own, "data digest"):
        all_clients |= part
    return sha256(b"".join(all_clients[k] for k in sorted(all_clients))).hexdigest()
