"""The memory that each rank takes on its GPU, estimated before samples and models go there.

Ranks that share a GPU share its memory. Samples that do not fit stay in the host's and come by batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pfedmoe_mpi.algorithms.base import Algorithm, Task
from pfedmoe_mpi.config.sections import Train
from pfedmoe_mpi.core.parts import Workbench, modules_by_kind
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models.names import is_own

LIBRARIES = 512 * 2**20  # an allowance for cuBLAS, cuDNN and the allocator's gaps, not a measurement
BACKWARD = 1.5  # a step's memory over that of the saved tensors: gradients of some of them exist beside them


@dataclass(frozen=True)
class Need:
    """Bytes of a rank on its GPU: its samples; models, gradients and momenta; and what a step keeps."""

    samples: float
    models: float
    step: float

    @property
    def fixed(self) -> float:
        """What cannot stay in host memory."""
        return self.models + self.step + LIBRARIES

    @property
    def total(self) -> float:
        """All of it, with the samples."""
        return self.samples + self.fixed


@dataclass(frozen=True)
class Rank:
    """A rank's GPU by name (empty: it trains on a CPU), the bytes free there, and those it needs."""

    gpu: str
    free: float
    need: Need


def estimate(task: Task, method: Algorithm, rows: int, bytes_per_sample: int) -> Need:
    """Return what a rank with so many rows needs on a GPU.

    Models are there once per architecture; gradients, momenta and what a step keeps of one client at a time,
    and with CUDA graphs once per architecture, too. What a step keeps is counted for extractors of this
    program, by a forward pass without numbers.
    """
    bench = Workbench(task.config.seed, torch.device("cpu"))
    specs = [method.state(), *(method.client_state(k) for k in range(min(task.clients, len(task.pool))))]
    sizes = {
        (name, part.kind): bench.layout({name: part}).size for spec in specs for name, part in spec.items()
    }
    frozen = sum(bench.frozen_layout(part).size for part in modules_by_kind(specs).values())
    moments = 1 if task.config.train.optimiser == "sgd" else 2
    client = bench.layout(specs[0]).size + max(bench.layout(spec).size for spec in specs[1:])
    trained = sum(sizes.values()) if task.config.train.graphs == "on" else client
    models = 4.0 * (sum(sizes.values()) + frozen + (1 + moments) * trained)
    kept = {name: saved_bytes(task, name) for name in {*task.pool, task.shared}}
    by_kind = {
        part.kind: kept[name] for name in kept for part in (task.model(name), task.extractor(name))
    }  # fmt: skip
    per_spec = [sum(by_kind.get(part.kind, 0.0) for part in spec.values()) for spec in specs]
    steps = [per_spec[0] + own for own in per_spec[1:]]
    step = BACKWARD * (sum(steps) if task.config.train.graphs == "on" else max(steps))
    return Need(float(rows * bytes_per_sample), models, step)


def saved_bytes(task: Task, name: str) -> float:
    """Return the bytes that a step with an architecture keeps for its backward pass; 0 for a user's own."""
    if not is_own(name):
        return 0.0
    train, saved = task.config.train, {}
    module = task.extractor(name).skeleton().to("meta")
    parameters = {id(p) for p in module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in parameters and not isinstance(tensor, nn.Parameter):
            saved[id(tensor.untyped_storage())] = tensor  # kept alive, so that no other takes its place
        return tensor

    kind = torch.int32 if task.vocabulary else torch.float32
    x = torch.empty((train.batch, *task.shape), dtype=kind, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module.train()(x)
    width = 0.5 if train.precision == "bf16" else 1.0
    return width * sum(tensor.numel() * tensor.element_size() for tensor in saved.values())


def stay_in_host_memory(ranks: Sequence[Rank], train: Train) -> list[bool]:
    """Return for each rank whether its samples stay in the host's memory; the same for those of one GPU.

    Raises:
        ConfigError: models do not fit into a GPU, or samples that are to be there do not.
    """
    result = [train.samples_in == "host"] * len(ranks)
    for gpu in sorted({rank.gpu for rank in ranks if rank.gpu}):
        sharing = [number for number, rank in enumerate(ranks) if rank.gpu == gpu]
        free = min(ranks[number].free for number in sharing)
        fixed, total = (
            sum(getattr(ranks[number].need, what) for number in sharing) for what in ("fixed", "total")
        )
        who = (
            f"rank {sharing[0]}"
            if len(sharing) == 1
            else f"the {len(sharing)} ranks from rank {sharing[0]} on"
        )
        if fixed > free:
            raise ConfigError(
                f"train.batch = {train.batch}: {who} need {fixed / 1e9:,.1f} GB on their GPU for models "
                f"and a step, and {free / 1e9:,.1f} GB are free",
                _remedy(ranks[sharing[0]].need, train, free, len(sharing)),
            )
        if total > free and train.samples_in == "gpu":
            raise ConfigError(
                f"train.samples_in = gpu, but {who} need {total / 1e9:,.1f} GB there, and "
                f"{free / 1e9:,.1f} GB are free",
                "--train.samples_in auto leaves the samples in the host's memory",
            )
        for number in sharing:
            result[number] |= total > free
    return result


def _remedy(need: Need, train: Train, free: float, ranks: int) -> str:
    """Return fewer ranks where one rank fits, else smaller batches, else other models."""
    if ranks > 1 and need.fixed <= free:
        return f"start at most {max(1, math.floor(free / need.fixed))} ranks per GPU, with mpirun -n"
    batch, step = train.batch, need.step
    while batch > 2 and need.fixed - need.step + step > free:
        batch, step = batch // 2, step / 2
    if need.fixed - need.step + step > free:
        return "use a GPU with more memory, or a smaller --model.pool"
    return f"--train.batch {batch} --train.accumulate {train.accumulate * -(-train.batch // batch)}"
