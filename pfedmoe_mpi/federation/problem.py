"""What a federation learns: effective settings, data, partition, and this rank's device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pfedmoe_mpi.algorithms.base import Task
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.data import Dataset, Partition
from pfedmoe_mpi.data.noise import with_noise
from pfedmoe_mpi.federation import own_code
from pfedmoe_mpi.federation.distribute import open_everywhere
from pfedmoe_mpi.federation.effective import effective_config, listed, with_listed
from pfedmoe_mpi.federation.memory import Host
from pfedmoe_mpi.federation.plan import Plan, make_plan, make_task
from pfedmoe_mpi.mpi import device
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.mpi.device import Device


@dataclass(frozen=True)
class Problem:
    """The problem, before any model is made; equal on every rank, except for `device`.

    `code` is the text of the user's own files by name, `costs` the relative cost of training each client for
    one epoch.
    """

    config: Config
    code: Mapping[str, str]
    dataset: Dataset
    partition: Partition
    costs: Sequence[float]
    task: Task
    device: Device


def pose(comm: Comm, settings: Config, *, warn: bool) -> Problem:
    """Read the data, and make the effective settings and the plan for them; collective.

    Args:
        warn: rank 0 prints the data's warnings.

    Raises:
        UserError: on all ranks: a setting or the data cannot be used.
    """
    code = own_code.load(comm, settings)
    settings = with_listed(settings, comm.from_root(lambda: listed(settings), "partition file"))
    dataset = open_everywhere(comm, settings, warn=warn)
    threads = device.threads(comm, settings.train.threads)
    settings = effective_config(settings, dataset, threads)
    own_device = device.choose(comm, settings.train)
    host = Host(comm.local()[1], own_device.device.type == "cpu")
    plan = comm.from_root(lambda: make_plan(settings, dataset, host), "plan", Plan.without_rows)
    partition = plan.partition
    dataset = with_noise(plan.fitted or dataset, partition, settings.partition.noise, settings.seed)
    task = make_task(settings, dataset, partition)
    return Problem(settings, code, dataset, partition, plan.costs, task, own_device)
