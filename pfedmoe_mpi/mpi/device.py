"""Which GPU or how many threads this rank gets, and the settings on which bits depend."""

from __future__ import annotations

import os
import platform
import resource
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pfedmoe_mpi.config.sections import Train
from pfedmoe_mpi.environment import CORES
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.mpi.comm import Comm

if TYPE_CHECKING:
    import torch


def threads(comm: Comm, setting: int | str) -> int:
    """One number for the whole job; `auto` is the smallest cores ÷ ranks over all hosts.

    An OMP_NUM_THREADS in the environment is what `auto` takes instead.
    """
    if isinstance(setting, int):
        return setting
    given = os.environ.get("OMP_NUM_THREADS", "")
    own = int(given) if given.isdigit() and int(given) > 0 else max(1, CORES // comm.local()[1])
    return min(comm.gather(own, "threads"))


@dataclass(frozen=True)
class Device:
    """This rank's device, and the conditions under which bits repeat."""

    device: torch.device
    model: str  # processor or GPU
    line: str  # for people


def choose(comm: Comm, train: Train) -> Device:
    """Take the GPU local rank mod visible GPUs, or the CPU, and fix every setting on which bits depend.

    Raises:
        ConfigError: train.device cuda where no GPU is visible, or ranks on unlike devices.
    """
    import torch

    assert isinstance(train.threads, int)
    torch.set_num_threads(train.threads)
    local_rank, local_size = comm.local()
    visible = torch.cuda.device_count() if train.device != "cpu" and torch.cuda.is_available() else 0
    host = platform.node()
    if train.device == "cuda" and not visible:
        found = None
    elif visible:
        index = local_rank % visible
        model = torch.cuda.get_device_name(index)
        found = Device(torch.device("cuda", index), model, f"{host} GPU {index} of {visible} ({model})")
    else:
        model = processor()
        shared = f"{CORES} cores for {local_size} ranks, {train.threads} thread(s)"
        found = Device(torch.device("cpu"), model, f"{host} {shared}")
    models = comm.gather(found.model if found else "no GPU", "devices")
    if "no GPU" in models:
        rank = models.index("no GPU")
        raise ConfigError(f"rank {rank} sees no GPU", "--train.device cpu, or ask the job for GPUs")
    if len(set(models)) > 1 and comm.rank == 0:
        listed = "; ".join(f"rank {models.index(m)}: {m}" for m in dict.fromkeys(models))
        print(f"note: unlike devices, so bits differ from a run on equal ones: {listed}", file=sys.stderr)
    assert found
    _repeatable(found.device)
    return found


def _repeatable(device: torch.device) -> None:
    """fp32 means no TF32; deterministic algorithms, no autotuning."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def rss_mb() -> float:
    """This process's largest resident memory so far, MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
