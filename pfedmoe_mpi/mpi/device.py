"""The GPU or the CPU threads of this rank, and the torch settings on which the bits of a result depend."""

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
    """Return the threads per rank, the same for the whole job; collective if `setting` is `auto`.

    `auto` is the smallest cores ÷ ranks over all hosts, or OMP_NUM_THREADS where the environment sets it.
    """
    if isinstance(setting, int):
        return setting
    from_environment = os.environ.get("OMP_NUM_THREADS", "")
    if from_environment.isdigit() and int(from_environment) > 0:
        here = int(from_environment)
    else:
        here = max(1, CORES // comm.local()[1])
    return min(comm.gather(here, "threads"))


@dataclass(frozen=True)
class Device:
    """This rank's device; results repeat bit for bit on equal models."""

    device: torch.device
    model: str  # processor or GPU
    line: str  # description for the log


def choose(comm: Comm, train: Train) -> Device:
    """Choose GPU number (local rank mod visible GPUs), or the CPU; fix every setting on which bits depend.

    Collective. Rank 0 prints a note if the ranks have different devices.

    Raises:
        ConfigError: on all ranks, if train.device = cuda and some rank sees no GPU.
    """
    import torch

    assert isinstance(train.threads, int)
    torch.set_num_threads(train.threads)
    local_rank, local_size = comm.local()
    visible = torch.cuda.device_count() if train.device != "cpu" and torch.cuda.is_available() else 0
    host = platform.node()
    if train.device == "cuda" and not visible:
        chosen = None
    elif visible:
        index = local_rank % visible
        model = torch.cuda.get_device_name(index)
        chosen = Device(torch.device("cuda", index), model, f"{host} GPU {index} of {visible} ({model})")
    else:
        model = processor()
        shared = f"{CORES} cores for {local_size} rank(s), {train.threads} thread(s)"
        chosen = Device(torch.device("cpu"), model, f"{host} {shared}")
    models = comm.gather(chosen.model if chosen else "no GPU", "devices")
    if "no GPU" in models:
        rank = models.index("no GPU")
        raise ConfigError(
            f"train.device = cuda, but rank {rank} sees no GPU",
            "use --train.device cpu, or request GPUs for the job (Slurm: --gpus-per-node)",
        )
    if len(set(models)) > 1 and comm.rank == 0:
        listed = "; ".join(f"rank {models.index(m)}: {m}" for m in dict.fromkeys(models))
        print(
            f"note: the ranks' devices differ, so bits differ from a run on equal devices: {listed}",
            file=sys.stderr,
        )
    assert chosen
    _make_repeatable(chosen.device, train.deterministic)
    return chosen


def _make_repeatable(device: torch.device, deterministic: bool) -> None:
    """Set torch to fp32 without TF32 and no autotuning; on a GPU, if asked for, to deterministic algorithms."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)


def processor() -> str:
    """Return the processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_rss_mib() -> float:
    """Return this process's largest resident memory so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
