"""`bench wide`: what ranks cost by themselves, from 1 to 64: start, a round's overhead, and the end.

Every job trains the same two clients with a tiny model, so that all but two ranks only take part in the sums.
Like `bench start` it runs without a launcher and starts one itself.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from pfedmoe_mpi import environment
from pfedmoe_mpi.bench import jobs
from pfedmoe_mpi.bench.progress import announce
from pfedmoe_mpi.bench.start import LIMIT, launcher
from pfedmoe_mpi.errors import EXIT_DONE, ConfigError, LaunchError
from pfedmoe_mpi.mpi import device
from pfedmoe_mpi.mpi.memory import available, shortage
from pfedmoe_mpi.storage import untrusted_json

RANKS, ROUNDS = 64, 20
SETTINGS = (
    *("--data.source=synthetic", "--data.samples=2000", "--data.size=8", "--clients=64"),
    *("--algorithm=fedavg", "--model.pool=mlp5", "--model.dim=32", "--participation=0.03"),
    *("--partition.kind=iid", "--train.device=cpu", "--eval.every=1000", f"--rounds={ROUNDS}"),
)
HEADING = f"{'ranks':>6}{'start, s':>10}{'round, ms':>11}{'overhead, ms':>14}{'end, s':>8}"


@dataclass(frozen=True)
class Times:
    """Seconds of one job: until round 1, a round (median), its part beside training, and the end.

    `memory`: bytes that the job took of what was free on the host, for each rank. Ranks share the code of
    torch, so that their sizes (`rss_mb`) count it once for each of them.
    """

    start: float
    round: float
    overhead: float
    end: float
    memory: float


def run(words: Sequence[str]) -> int:
    """Measure jobs of 1, 2, 4, … ranks, print their table and a straight line through each column.

    Args:
        words: the largest number of ranks, or nothing.

    Raises:
        ConfigError: there are other words.
        LaunchError: this runs under a launcher, there is no launcher, or a job fails.
    """
    if len(words) > 1 or not all(word.isdecimal() and int(word) for word in words):
        problem = f"bench wide takes the largest number of ranks, not {' '.join(words)}"
        raise ConfigError(problem, "pfedmoe-mpi bench wide 64")
    if environment.launched_size(os.environ) > 1:
        remedy = "run it without mpirun: pfedmoe-mpi bench wide 64"
        raise LaunchError("bench wide launches ranks itself", remedy)
    most = int(words[0]) if words else RANKS
    print(f"{device.processor()}: {environment.CORES} cores, {time.strftime('%Y-%m-%d %H:%M %z')}")
    print(HEADING, flush=True)
    ranks = [1 << n for n in range(most.bit_length())]
    found: list[Times] = []
    for number in ranks:
        problem = shortage(number * found[-1].memory, number) if found else ""
        if problem:
            announce(f"wide: {number} ranks and more are left out: {problem}")
            break
        announce(f"wide: {number} ranks")
        found.append(measure(number))
        times = found[-1]
        numbers = (times.start, 1e3 * times.round, 1e3 * times.overhead, times.end)
        print("{:6d}{:10.2f}{:11.1f}{:14.1f}{:8.2f}".format(number, *numbers), flush=True)
    for name in ("start", "overhead", "end"):
        fixed, each = line(ranks[: len(found)], [getattr(times, name) for times in found])
        print(f"{name}: {fixed:.3g} s + {1e3 * each:.3g} ms for each rank")
    return EXIT_DONE


def line(ranks: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Return a and b of seconds ≈ a + b · ranks, by least squares; b = 0 for a single point."""
    if len(ranks) < 2:
        return seconds[0], 0.0
    each, fixed = np.polyfit(ranks, seconds, 1)
    return float(fixed), float(each)


def measure(ranks: int) -> Times:
    """Run one job and return its times.

    Raises:
        LaunchError: it fails.
    """
    marks: dict[str, float] = {}
    free, started = available(), time.perf_counter()

    def mark(process: jobs.Process, text: str) -> None:
        """Keep the seconds until round 1 began and the last was done, and the memory taken by then."""
        if text.startswith("run folder "):
            marks["start"] = time.perf_counter() - started
        elif re.match(rf"round {ROUNDS}/", text):
            marks["last"], marks["memory"] = time.perf_counter() - started, free - available()

    with tempfile.TemporaryDirectory(prefix="pfedmoe-bench-") as folder:
        jobs.run([*launcher(ranks), "-m", "pfedmoe_mpi", *SETTINGS, f"--run.dir={folder}/run"], LIMIT, mark)
        ended = time.perf_counter() - started
        rows = untrusted_json.read_lines(Path(folder, "run", "metrics.jsonl"))[1:]
    seconds = [row["seconds"] for row in rows if row["seconds"]["write"] is None]
    rounds = [each["total"] for each in seconds]
    overheads = [each["total"] - each["train"] - each["evaluate"] for each in seconds]
    return Times(
        start=marks["start"],
        round=median(rounds),
        overhead=median(overheads),
        end=ended - marks["last"],
        memory=marks["memory"] / ranks,
    )
