"""The GPU or the CPU threads of this rank, and the torch settings on which the bits of a result depend."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
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
    gpu: str = ""  # name of the GPU, or of a part of it (MIG); equal on ranks that share it


def choose(comm: Comm, train: Train) -> Device:
    """Choose a GPU by `assign`, or the CPU; fix every setting on which bits depend.

    Collective. Rank 0 prints a note if the ranks have different devices.

    Raises:
        ConfigError: on all ranks, if train.device = cuda and some rank sees no GPU.
    """
    import torch

    assert isinstance(train.threads, int)
    torch.set_num_threads(train.threads)
    names = _visible(comm) if train.device != "cpu" else []
    host, (local_rank, local_size) = platform.node(), comm.local()
    ranks = comm.gather((host, local_rank, names), "GPUs")
    everyone = [seen for _, _, seen in ranks]
    first = [min(local for other, local, _ in ranks if other == at) for at, _, _ in ranks]
    position = assign(everyone, first)[comm.rank]
    if position is not None:
        model = torch.cuda.get_device_name(position)
        line = f"{host} GPU {position} of {len(names)} ({model})"
        chosen = Device(torch.device("cuda", position), model, line, names[position])
    else:
        model = processor()
        shared = f"{CORES} cores for {local_size} rank(s), {train.threads} thread(s)"
        chosen = Device(torch.device("cpu"), model, f"{host} {shared}")
    if train.device == "cuda" and not all(everyone):
        raise ConfigError(
            f"train.device = cuda, but rank {comm.names[everyone.index([])]} sees no GPU",
            "use --train.device cpu, or request GPUs for the job (Slurm: --gpus-per-node)",
        )
    models = comm.gather(chosen.model, "devices")
    if len(set(models)) > 1 and comm.rank == 0:
        listed = "; ".join(f"rank {models.index(m)}: {m}" for m in dict.fromkeys(models))
        print(
            f"note: the ranks' devices differ, so bits differ from a run on equal devices: {listed}",
            file=sys.stderr,
        )
    _make_repeatable(chosen.device, train.deterministic)
    return chosen


def assign(visible: Sequence[Sequence[str]], first: Sequence[int] = ()) -> list[int | None]:
    """Return for each rank the position of its GPU among those that it sees; None if it sees none.

    Rank after rank takes of its GPUs the one with the fewest ranks, and of equals the first. So ranks that
    see the same GPUs take them in turn, and ranks to which a scheduler gave GPUs of their own take these.

    Args:
        visible: by rank, the names of the GPUs that it sees; a GPU has the same name on all ranks.
        first: by rank, how many ranks on its host do other work beside these and come before them; of equals
            it begins after the GPUs that those take. Default: none.
    """
    ranks_of: Counter[str] = Counter()
    positions: list[int | None] = []
    for rank, names in enumerate(visible):
        turn, size = first[rank] if first else 0, len(names)
        key = {place: (ranks_of[name], (place - turn) % size) for place, name in enumerate(names)}
        position = min(range(size), key=key.__getitem__, default=None)
        if position is not None:
            ranks_of[names[position]] += 1
        positions.append(position)
    return positions


def parts_of_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the parts of GPUs (MIG) that CUDA_VISIBLE_DEVICES names; empty if it names whole GPUs."""
    names = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return [name for name in names if name.startswith("MIG-")]


def _visible(comm: Comm) -> list[str]:
    """Return the names of the GPUs that this rank sees; collective.

    CUDA shows a process only the first of several parts of GPUs. So the rank's own is chosen by the names in
    the environment, and made the only one before CUDA starts.
    """
    import torch

    parts = parts_of_gpus(os.environ)
    position = assign(comm.gather(parts, "parts of GPUs"))[comm.rank]
    if position is not None and not torch.cuda.is_initialized():
        os.environ["CUDA_VISIBLE_DEVICES"] = parts[position]
    if not torch.cuda.is_available():
        return []
    if position is not None:
        return [parts[position]]
    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]


def _make_repeatable(device: torch.device, deterministic: bool) -> None:
    """Set torch to fp32 without TF32 and no autotuning; on a GPU, as asked for, to deterministic kernels."""
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
