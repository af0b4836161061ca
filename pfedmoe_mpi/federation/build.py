"""From a configuration to a federation that is ready for round 1: data, partition, models, clients, device.

Every user error that needs the data is raised here, on all ranks and before anything is written.
"""

from __future__ import annotations

import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pfedmoe_mpi import algorithms
from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.checkpoint import Checkpoint, weights
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core.batches import Normalise
from pfedmoe_mpi.core.beginning import Beginning
from pfedmoe_mpi.core.graphs import Graphs
from pfedmoe_mpi.core.kept import Kept
from pfedmoe_mpi.core.parts import Module, Spec, Tensor, Workbench
from pfedmoe_mpi.core.sample_step import SamplePrivacy
from pfedmoe_mpi.core.staging import Staging
from pfedmoe_mpi.core.tail import Tail
from pfedmoe_mpi.core.turn import Engine
from pfedmoe_mpi.data import Dataset, Partition
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation import (
    client_privacy,
    declarations,
    frozen,
    gpu_memory,
    masked_round,
    placement,
    pretrained,
    sample_privacy,
    trial,
)
from pfedmoe_mpi.federation.distribute import data_digest, distribute, gate_rows, reserved
from pfedmoe_mpi.federation.federation import Clients, Federation
from pfedmoe_mpi.federation.problem import Problem, pose
from pfedmoe_mpi.federation.round_sum import check_cohort
from pfedmoe_mpi.federation.server_optimiser import check_method
from pfedmoe_mpi.federation.store import Store
from pfedmoe_mpi.federation.stream import Stream
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.mpi.device import Device
from pfedmoe_mpi.mpi.memory import available

SHARE = 0.5  # of the free memory, for clients' vectors; torch, activations and buffers take the rest


def build(comm: Comm, settings: Config, *, warn: bool = True, loaded: Checkpoint | None = None) -> Federation:
    """Assemble a federation; collective. With `warn` rank 0 prints the data's warnings.

    With a checkpoint, whose vectors replace the initial ones, no file of weights is read, and frozen tensors
    are those of its run folder.

    Raises:
        UserError: on all ranks: a setting or the data cannot be used.
    """
    problem = pose(comm, settings, warn=warn)
    settings, task = problem.config, problem.task
    dataset, partition = problem.dataset, problem.partition
    method = algorithms.load(settings.algorithm)(task)
    method.poll = comm.poll
    method.read_weights = weights.read
    specs = shared_specs(method.client_state(k) for k in range(task.clients))  # ConfigErrors are collective
    begun_with = pretrained.load(comm, settings, (method.state(), *specs), loaded)
    workbench = Workbench(settings.seed, problem.device.device, begun_with.weights, settings.model.start)
    frozen_tensors = frozen.load(comm, workbench, (method.state(), specs), loaded)
    state_layout = workbench.layout(method.state())
    layouts = {id(spec): workbench.layout(spec) for spec in {id(spec): spec for spec in specs}.values()}
    client_layouts = [layouts[id(spec)] for spec in specs]
    declarations.check(method, state_layout, client_layouts)
    check_cohort(task, method.cohort(1))
    check_method(settings, method, state_layout)
    masked_round.check(comm, settings, method, state_layout, loaded)
    private = client_privacy.of(comm, settings, method, state_layout, loaded)
    home = placement.homes(problem.costs, comm.size)
    own_device, streamed = place_samples(comm, problem, home, method)
    tails = comm.from_root(lambda: frozen.find_tails(task, (method.state(), *specs)), "frozen layers")
    stream = make_stream(settings, dataset, partition)
    samples = sample_privacy.of(comm, settings, method, state_layout.sizes, stream, loaded)
    engine = make_engine(comm, problem, tails, samples)
    workbench.kept = engine.kept
    shards = distribute(comm, dataset, partition, home, own_device.device, streamed)
    beginning = Beginning(workbench, specs.__getitem__, method.initial)
    store = Store(beginning.vector, *memory_and_folder(comm, settings))
    largest = max(layout.size for layout in layouts.values())
    federation = Federation(
        config=settings,
        code=problem.code,
        dataset=dataset,
        partition=partition,
        data_digest=data_digest(comm, shards),
        task=task,
        method=method,
        pretrained=begun_with,
        frozen=frozen_tensors,
        workbench=workbench,
        engine=engine,
        device=own_device,
        home=home,
        costs=problem.costs,
        state_layout=state_layout,
        specs=specs,
        client_layouts=client_layouts,
        clients=Clients(shards, specs, store, keep=bool(tails)),
        beginning=beginning,
        store=store,
        staging=Staging(own_device.device, largest),
        streamed=streamed,
        stream=stream,
        private=private,
        gate_rows=gate_rows(comm, dataset, partition, settings.seed, own_device.device)
        if method.experts
        else None,
        reserved=reserved(comm, dataset, partition, own_device.device, streamed)
        if method.pretrains
        else None,
    )
    sample_privacy.check(comm, federation)
    trial.check(comm, federation)
    return federation


def place_samples(
    comm: Comm, problem: Problem, home: Sequence[int], method: Algorithm
) -> tuple[Device, bool]:
    """Return the device with its memory in its line, and whether samples stay in host memory; collective.

    Raises:
        ConfigError: on all ranks: memory of a GPU does not suffice.
    """
    chosen, dataset, partition = problem.device, problem.dataset, problem.partition
    free, need = 0.0, gpu_memory.Need(0.0, 0.0, 0.0)
    if chosen.gpu:
        splits = (partition.train, partition.validation, partition.test)
        rows = sum(len(s[k]) for s in splits for k, rank in enumerate(home) if rank == comm.rank)
        size = math.prod(dataset.shape) * dataset.dtype.itemsize + 8  # with its label
        need = gpu_memory.estimate(method.task, method, rows, size)
        unused = torch.cuda.memory_reserved(chosen.device) - torch.cuda.memory_allocated(chosen.device)
        free = float(torch.cuda.mem_get_info(chosen.device)[0] + unused)
    ranks = comm.gather(gpu_memory.Rank(chosen.gpu, free, need), "memory of GPUs")
    streamed = gpu_memory.stay_in_host_memory(ranks, problem.config.train)[comm.rank]
    if chosen.gpu:
        sharing = sum(rank.gpu == chosen.gpu for rank in ranks)
        needed = need.fixed if streamed else need.total
        line = f"{chosen.line}, {sharing} rank(s) on it, {needed / 1e9:.1f} of {free / 1e9:.1f} GB estimated"
        chosen = replace(chosen, line=line + (", samples in host memory" if streamed else ""))
    return chosen, streamed


def make_engine(
    comm: Comm, problem: Problem, tails: Mapping[str, Tail], samples: SamplePrivacy | None
) -> Engine:
    """Return the settings by which this rank computes; `tails` are of frozen layers, by kind of module."""
    settings, dataset, device = problem.config, problem.dataset, problem.device.device
    normalise = Normalise(dataset.mean, dataset.std, len(dataset.shape), device)
    return Engine(
        device,
        normalise,
        settings.train,
        settings.eval.batch,
        settings.seed,
        settings.rounds,
        comm.poll,
        Kept(tails, normalise, settings.eval.batch, comm.poll),
        make_graphs(comm, settings, problem.device),
        samples,
    )


def make_graphs(comm: Comm, settings: Config, chosen: Device) -> Graphs | None:
    """Return the CUDA graphs of this rank's steps, None without; rank 0 notes that a CPU has none."""
    if settings.train.graphs == "off":
        return None
    without = "" if chosen.gpu else "on a CPU"
    without = "with privacy.unit = sample" if settings.privacy.unit == "sample" else without
    if without:
        if comm.rank == 0:
            print(f"note: train.graphs = on has no effect {without}", file=sys.stderr, flush=True)
        return None
    return Graphs(settings.train.batch)


def shared_specs(specs: Iterable[Spec]) -> list[Spec]:
    """Return the specifications of all clients; equal ones are one object."""
    known: dict[tuple[object, ...], Spec] = {}
    return [known.setdefault(tuple(map(_key, spec.items())), spec) for spec in specs]


def _key(item: tuple[str, Module | Tensor]) -> tuple[str, ...]:
    name, part = item
    return (name, part.kind, part.architecture) if isinstance(part, Module) else (name, repr(part))


def memory_and_folder(comm: Comm, settings: Config) -> tuple[float, Path]:
    """Return a rank's bytes for its clients' vectors, and the folder for the others; collective.

    Raises:
        ConfigError: on all ranks: run.scratch is not a folder, or cannot be written.
    """
    budget, scratch = settings.run.memory, settings.run.scratch
    ranks = comm.local()[1]
    folder = Path(scratch or tempfile.gettempdir()).absolute()

    comm.attempt(lambda: _check_scratch(folder) if scratch else None, "run.scratch")
    return SHARE * available(ranks) / ranks if budget == "auto" else 1e9 * budget, folder


def _check_scratch(folder: Path) -> None:
    """Refuse a folder in which this rank cannot make the file for its clients' vectors."""
    name, host = f"run.scratch = {folder}", platform.node()
    if not os.path.isdir(folder):
        raise ConfigError(f"{name} is missing on {host}", f"mkdir -p {folder} on every host")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        problem = f"{name} cannot be written on {host}: {error.strerror or error}"
        raise ConfigError(problem, "name a folder of the node's own disk that you may write") from error


def make_stream(settings: Config, dataset: Dataset, partition: Partition) -> Stream | None:
    """Return the stream of `stream.kind`, None if data do not drift."""
    if settings.stream.kind == "none":
        return None
    labels = [dataset.labels[rows] for rows in partition.train]
    return Stream(settings.stream, settings.seed, labels, dataset.classes)
