"""Estimated cost of runs on this machine: every partition is drawn, a few batches of every kind are timed.

Included are the clients' training, all evaluations and the disk use; not included are the times of sums,
training on the server, checkpoints and a method's work before round 1.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, replace
from functools import partial
from statistics import median

import numpy as np
import torch

from pfedmoe_mpi import algorithms, config
from pfedmoe_mpi.algorithms.base import Algorithm, Task
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core.batches import Normalise, Split
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.fixedpoint import NotFiniteError
from pfedmoe_mpi.core.kept import Kept
from pfedmoe_mpi.core.parts import Workbench, modules_by_kind
from pfedmoe_mpi.core.turn import Engine, Turn
from pfedmoe_mpi.data import Dataset
from pfedmoe_mpi.data.sources.open import open_dataset
from pfedmoe_mpi.errors import StoppedError, UserError
from pfedmoe_mpi.federation import effective, plan
from pfedmoe_mpi.federation.disk import DiskUse, disk_use
from pfedmoe_mpi.federation.evaluation import measure
from pfedmoe_mpi.federation.frozen import find_tails
from pfedmoe_mpi.mpi import device
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.reproduce.grid import TableError, TableRun

FEW, MANY = 16, 64  # samples of a timing: FEW to warm up, and alone where they are slow already
SLOW = 0.25  # seconds
TURNS = 5  # timed turns, whose median is used
CLIENTS = 20  # of the timed federation: enough for the anchors of ten experts
# Settings on which the time of a mini-batch does not depend.
IRRELEVANT = {
    *("seed", "rounds", "clients", "participation", "data", "partition", "unseen", "join", "stream"),
    *("server", "faults", "eval", "run"),
}


@dataclass(frozen=True)
class Size:
    """The size of one run.

    Attributes:
        train: training samples by client, 0 for one that never trains.
        test: samples by client that an evaluation measures.
        members: clients of the cohort, or their expected number.
        settings: the run's effective settings.
    """

    train: Sequence[int]
    test: Sequence[int]
    members: float
    shape: tuple[int, ...]
    classes: int
    dtype: str
    vocabulary: int
    settings: Mapping[str, object]

    @property
    def config(self) -> Config:
        """The settings as a configuration."""
        return config.build(self.settings)

    @property
    def kind(self) -> str:
        """A key that is equal for runs whose mini-batches take the same time."""
        tree = {k: v for k, v in config.to_tree(self.config).items() if k not in IRRELEVANT}
        tree["train"] = {k: v for k, v in tree["train"].items() if k not in {"epochs", "steps"}}
        return json.dumps([tree, self.shape, self.classes, self.dtype, self.vocabulary], sort_keys=True)


@dataclass(frozen=True)
class Cost:
    """Training samples of all rounds (each epoch counts), seconds on the ranks of this job, and disk use."""

    samples: float
    seconds: float
    disk: DiskUse

    def share(self, factor: float) -> Cost:
        """Return the cost of this share of the rounds; the run folder is as large as after all of them."""
        return replace(self, samples=factor * self.samples, seconds=factor * self.seconds)


@dataclass(frozen=True)
class Pace:
    """Seconds of a client's turn: `step` + n · (`sample` + epochs · `epoch`); `test` per measured sample."""

    step: float
    sample: float
    epoch: float
    test: float

    def turn(self, samples: int, epochs: float) -> float:
        """Return the seconds of one turn."""
        return self.step + samples * (self.sample + epochs * self.epoch)


def costs(world: Comm, runs: Sequence[TableRun], ranks: int) -> dict[str, Cost]:
    """Return the cost of each run on `ranks` ranks by its name; collective.

    Raises:
        UserError: on all ranks: the data, the partition or the models of a run are invalid.
        StoppedError: on all ranks.
    """
    sizes = world.from_root(lambda: dict(_sizes(runs)), "the runs' sizes")
    paces: dict[str, list[Pace]] = {}
    numbers: dict[str, tuple[int, list[int], int]] = {}
    for size in sizes.values():
        if size.kind not in paces:
            paces[size.kind] = _paces(world, size)
            numbers[size.kind] = _numbers(_task(size))
    return {
        name: _cost(size, paces[size.kind], _disk(size, numbers[size.kind], ranks), ranks)
        for name, size in sizes.items()
    }


# Sizes, on rank 0


def _sizes(runs: Sequence[TableRun]) -> Iterator[tuple[str, Size]]:
    """Yield each run's name and size; consecutive runs share a data set, equal partitions are drawn once."""
    dataset: Dataset | None = None
    opened = ""
    sizes: dict[str, Size] = {}  # by data set and partition
    try:
        for run in runs:
            with _run_in_errors(run):
                settings = effective.with_listed(run.config)
                drawn_by = [settings.seed, settings.clients] if settings.data.source == "synthetic" else []
                data = json.dumps([settings.data.model_dump(mode="json"), *drawn_by])
                if data != opened or dataset is None:
                    if dataset:
                        dataset.close()
                    dataset = open_dataset(settings.data, settings.seed, clients=settings.clients)
                    opened = data
                yield run.name, _size(effective.effective_config(settings, dataset, 1), dataset, data, sizes)
    finally:
        if dataset:
            dataset.close()


@contextmanager
def _run_in_errors(run: TableRun) -> Iterator[None]:
    """Add the run's name to a UserError."""
    try:
        yield
    except UserError as error:
        raise TableError(f"run {run.name}: {error.problem}", error.remedy) from error


def _size(settings: Config, dataset: Dataset, data: str, sizes: dict[str, Size]) -> Size:
    """Return a run's size; `data` identifies the data set, `sizes` holds those of earlier runs."""
    reserve = algorithms.load(settings.algorithm).reserve(settings)
    sections = [section.model_dump() for section in (settings.partition, settings.unseen)]
    key = json.dumps([data, *sections, settings.clients, settings.seed, reserve])
    flat = config.flatten(config.to_tree(settings))
    if key not in sizes:
        partition = plan.draw_partition(settings, dataset)
        train = [0 if k in partition.unseen else len(rows) for k, rows in enumerate(partition.train)]
        test = [len(a) + len(b) for a, b in zip(partition.test, partition.validation, strict=True)]
        fitted = dataset.fitted(partition)
        kind = (fitted.shape, fitted.classes, fitted.dtype.name, fitted.vocabulary)
        sizes[key] = Size(train, test, settings.expected_cohort, *kind, flat)
    size = replace(sizes[key], settings=flat, members=settings.expected_cohort)
    plan.check_models(_task(size))
    return size


# Times, on all ranks at once, as in training


def _task(size: Size) -> Task:
    """Return the task of a federation of CLIENTS or more clients, each with MANY samples of all classes."""
    settings = size.config
    counts = np.bincount(np.arange(MANY) % size.classes, minlength=size.classes)
    model = settings.model
    table = np.tile(counts, (max(CLIENTS, len(model.pool)), 1))
    fields = (settings, size.shape, size.classes, table, model.pool, model.shared, model.dim)
    return Task(*fields, vocabulary=size.vocabulary)


def _paces(world: Comm, size: Size) -> list[Pace]:
    """Return the pace of each architecture of the pool on the slowest rank; collective."""
    task = _task(size)
    threads = device.threads(world, task.config.train.threads)
    chosen = device.choose(world, task.config.train.model_copy(update={"threads": threads}))
    paces: list[Pace] = []
    with suppress(StoppedError):
        for client in range(len(task.pool)):
            paces.append(_Stopwatch(task, chosen.device, size.dtype, client, world.poll).pace())
    gathered = world.gather([astuple(pace) for pace in paces], "calibration")
    if any(len(of_rank) < len(task.pool) for of_rank in gathered):
        raise StoppedError
    return [Pace(*slowest) for slowest in np.array(gathered).max(axis=0).tolist()]


class _Stopwatch:
    """Timing of one client with random samples on this rank."""

    def __init__(
        self, task: Task, torch_device: torch.device, dtype: str, client: int, poll: Callable[[], None]
    ) -> None:
        self._task, self._device, self._dtype, self._id, self._poll = task, torch_device, dtype, client, poll
        workbench = Workbench(0, torch_device)
        method = self._method(1)
        state, spec = workbench.initial(method.state()), method.client_state(client)
        self._normalise = Normalise((), (), len(task.shape), torch_device)
        tails = find_tails(task, (method.state(), spec))
        self._kept = workbench.kept = Kept(tails, self._normalise, MANY, poll)
        self._splits = {samples: self._split(samples) for samples in (FEW, MANY)}
        self._parts = workbench.parts((method.state(), state), (spec, workbench.initial(spec, client)))
        roles = [role for _, role in method.cohort(1)]
        self._role = "client" if "client" in roles else roles[0]

    def pace(self) -> Pace:
        """Warm up, then time few samples, many samples, and twice the epochs, and solve for the pace.

        If an epoch of few samples is slow already, no more samples are timed.
        """
        warm_up, _ = self._steady(FEW, 1) if self._kept.tails else self._turn(FEW, 1), self._test(FEW)
        few = self._steady(FEW, 1)
        if warm_up > SLOW:  # because of the samples, or of the work done once per turn
            twice = self._turn(FEW, 2)
            if twice - few > SLOW:
                return Pace(max(2 * few - twice, 0.0), 0.0, (twice - few) / FEW, self._test(FEW) / FEW)
        once, twice = self._steady(MANY, 1), self._steady(MANY, 2)
        step = min(max((MANY * few - FEW * once) / (MANY - FEW), 0.0), once)
        epoch = min(max(twice - once, 0.0), once - step) / MANY
        return Pace(step, (once - step) / MANY - epoch, epoch, self._test(MANY) / MANY)

    def _steady(self, samples: int, epochs: int) -> float:
        """Return the median of TURNS turns, of fewer if slow; a median, as others may use the machine.

        Outputs of frozen layers are there before, as in all rounds but the first.
        """
        times: list[float] = []
        if self._kept.tails:
            self._turn(samples, epochs)
        while len(times) < TURNS and sum(times) < SLOW:
            times.append(self._turn(samples, epochs))
        return median(times)

    def _method(self, epochs: int) -> Algorithm:
        settings = self._task.config
        train = settings.train.model_copy(update={"epochs": epochs, "steps": 0})
        task = replace(self._task, config=settings.model_copy(update={"train": train}))
        return algorithms.load(settings.algorithm)(task)

    def _engine(self, method: Algorithm) -> Engine:
        train = method.task.config.train
        return Engine(self._device, self._normalise, train, MANY, 0, 2, self._poll, kept=self._kept)

    def _split(self, samples: int) -> Split:
        shape, generator = (samples, *self._task.shape), torch.Generator().manual_seed(0)
        highest = {"uint8": 256, "int32": self._task.vocabulary}.get(self._dtype)
        if highest:
            x = torch.randint(highest, shape, generator=generator).to(getattr(torch, self._dtype))
        else:
            x = torch.rand(shape, generator=generator)
        return Split(x.to(self._device), (torch.arange(samples) % self._task.classes).to(self._device))

    def _turn(self, samples: int, epochs: int) -> float:
        method, split = self._method(epochs), self._splits[samples]
        splits = {"train": split, "validation": split.empty(), "test": split}
        client = Client(self._id, {}, torch.empty(0), splits)
        turn = Turn(self._engine(method), method.loss, client, self._parts, 1, self._role)

        def learn() -> None:
            with suppress(NotFiniteError):  # random samples may diverge
                method.client_step(turn)

        return _seconds(learn, self._device)

    def _test(self, samples: int) -> float:
        method = self._method(1)
        work = partial(measure, self._engine(method), method, self._parts, self._splits[samples])
        return _seconds(work, self._device)


def _seconds(work: Callable[[], object], torch_device: torch.device) -> float:
    """Return the seconds of `work`, including what it started on a GPU."""
    if torch_device.type == "cuda":
        torch.cuda.synchronize(torch_device)
    started = time.perf_counter()
    work()
    if torch_device.type == "cuda":
        torch.cuda.synchronize(torch_device)
    return time.perf_counter() - started


def _numbers(task: Task) -> tuple[int, list[int], int]:
    """Return the numbers of the server's vector, of each architecture's clients, and of frozen tensors."""
    method = algorithms.load(task.config.algorithm)(task)
    workbench = Workbench(0, torch.device("cpu"))
    specs = [method.client_state(k) for k in range(len(task.pool))]
    modules = modules_by_kind((method.state(), *specs)).values()
    frozen = sum(workbench.frozen_layout(part).size for part in modules)
    return workbench.layout(method.state()).size, [workbench.layout(spec).size for spec in specs], frozen


def _disk(size: Size, numbers: tuple[int, list[int], int], ranks: int) -> DiskUse:
    """Return the disk use of a run from `_numbers` of its kind."""
    state, by_architecture, frozen = numbers
    clients = [by_architecture[k % len(by_architecture)] for k, samples in enumerate(size.train) if samples]
    rows = sum(size.train) + sum(size.test)
    return disk_use(size.config, state, clients, rows, size.classes, ranks, frozen)


def _cost(size: Size, paces: Sequence[Pace], disk: DiskUse, ranks: int) -> Cost:
    """Return a run's cost, from each client's expected share of the rounds.

    The ranks share the cohort's training, and the evaluation of the cohort and of all clients.
    """
    settings = size.config
    training = [k for k, n in enumerate(size.train) if n]
    members = min(size.members, len(training))
    busy = min(ranks, max(1, members))
    epochs, share = {k: settings.train.passes(size.train[k]) for k in training}, members / len(training)
    turns = sum(paces[k % len(paces)].turn(size.train[k], epochs[k]) for k in training) * share
    tests = sum(n * paces[k % len(paces)].test for k, n in enumerate(size.test))
    drawn = min(1.0, settings.drawn_clients / len(size.test))
    measured = tests * (drawn / min(ranks, len(size.test)) + share / busy)
    samples = settings.rounds * share * sum(epochs[k] * size.train[k] for k in training)
    seconds = settings.rounds * (turns / busy + measured / settings.eval.every)
    return Cost(samples, seconds, disk)
