"""The memory that this process may still take: the host's, its control group's and its own limits."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
# Of a control group, version 2 and 1: folder, limit, usage, and the part of the usage that can be given up.
_FILES = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def shortage(needed: float, ranks: int = 1) -> str:
    """Return why `needed` bytes for this many ranks on this host do not fit, or nothing if they do."""
    free, name = _free(ranks)
    if not name or needed <= free:
        return ""
    return f"{needed / 1e9:,.1f} GB are needed on this host, and {free / 1e9:,.1f} GB are free ({name})"


def available(ranks: int = 1) -> float:
    """Return the bytes that this many ranks on this host may still take together; infinite if unknown."""
    free, name = _free(ranks)
    return free if name else math.inf


def _free(ranks: int) -> tuple[int, str]:
    """Return the smallest of all limits, and its name; no name if there is none."""
    of_process = ((free * ranks, name) for free, name in _process())
    return min([*_host(), *_control_group(), *_slurm(), *of_process], default=(0, ""))


def _slurm() -> Iterator[tuple[int, str]]:
    """Yield what --mem or --mem-per-cpu leaves; where Slurm enforces it, the control group knows it too."""
    megabytes = os.environ.get("SLURM_MEM_PER_NODE", "")
    by_cpu, cpus = (os.environ.get(f"SLURM_{name}", "") for name in ("MEM_PER_CPU", "CPUS_ON_NODE"))
    if not megabytes.isdigit() and by_cpu.isdigit() and cpus.isdigit():
        megabytes = str(int(by_cpu) * int(cpus))
    if megabytes.isdigit() and int(megabytes):  # 0: all of the node's
        yield int(megabytes) << 20, "the job's --mem"


def _host() -> Iterator[tuple[int, str]]:
    facts = _numbers(Path("/proc/meminfo"))
    if "MemAvailable" in facts:
        yield 1024 * (facts["MemAvailable"] + facts.get("SwapFree", 0)), "this host"


def _process() -> Iterator[tuple[int, str]]:
    """Yield what the limits of this process leave."""
    facts = _numbers(Path("/proc/self/status"))
    for limit, used, name in (("RLIMIT_AS", "VmSize", "ulimit -v"), ("RLIMIT_DATA", "VmData", "ulimit -d")):
        most = resource.getrlimit(getattr(resource, limit))[0]
        if most != resource.RLIM_INFINITY:
            yield max(0, most - 1024 * facts.get(used, 0)), name


def _control_group() -> Iterator[tuple[int, str]]:
    """Yield what this process's control group and those above it leave."""
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        kind = "memory" if "memory" in controllers.split(",") else controllers
        if kind not in _FILES:
            continue
        folder, limit, usage, spare = _FILES[kind]
        place = Path(path.lstrip("/"))
        for group in (place, *place.parents):
            at = _GROUPS / folder / group
            most, used = _text(at / limit).strip(), _text(at / usage).strip()
            if most.isdigit() and used.isdigit():
                free = int(most) - int(used) + _numbers(at / "memory.stat").get(spare, 0)
                yield max(0, free), "the memory limit of its control group"


def _numbers(path: Path) -> dict[str, int]:
    """Return the lines `NAME NUMBER …` or `NAME: NUMBER …` of a file."""
    words = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
