"""What a federation of `bench scale` costs: `python -m pfedmoe_mpi.bench.at_scale FILE`, under MPI.

The file has a `Case` as JSON; a `Cost` as a line of JSON goes to stdout.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pfedmoe_mpi import config
from pfedmoe_mpi.bench.timing import run_round
from pfedmoe_mpi.errors import EXIT_DONE
from pfedmoe_mpi.mpi import session
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.mpi.device import peak_rss_mib

if TYPE_CHECKING:
    from pfedmoe_mpi.federation.loop import Loop

# Rounds measure nobody and write nothing by themselves.
ALWAYS = {
    **{"rounds": 1_000_000, "eval.every": 1_000_000, "run.checkpoint_every": 1_000_000},
    **{"run.checkpoint_minutes": 0.0, "run.timeout": 86_400.0},
}


@dataclass(frozen=True)
class Case:
    """A federation to measure.

    Attributes:
        settings: by dotted name.
        folder: an empty one for checkpoints.
        reference: settings of the federation whose rounds are measured in alternation; empty: of none.
        rounds: of training before these; a checkpoint is written `checkpoints` times in them.
        pairs: of rounds that are compared.
    """

    settings: Mapping[str, Any]
    folder: str
    reference: Mapping[str, Any]
    rounds: int
    checkpoints: int
    pairs: int


@dataclass(frozen=True)
class Cost:
    """Seconds, of the slowest rank; bytes; and the median ratio of a round to the reference's, 0 without.

    `checkpoint`, `written` and `changed` are of the last checkpoint: its seconds, the length of its file, and
    the bytes of the clients that trained since the one before. `memory` is the largest rank's, up to here.
    """

    clients: int
    setup: float
    round: float
    ratio: float
    evaluate: float
    checkpoint: float
    written: int
    changed: int
    memory: float


def measure(world: Comm, case: Case) -> Cost:
    """Build a federation, train, write, evaluate, and compare its rounds with the reference's; collective."""
    loop: Loop | None = None

    def build() -> None:
        nonlocal loop
        loop = _loop(world, case.settings, Path(case.folder))

    import pfedmoe_mpi.federation.loop  # noqa: F401  (torch is loaded before the time starts)

    setup = _timed(world, build)
    assert loop
    write, since, rounds = 0.0, 0, []
    for number in range(1, case.rounds + 1):
        rounds.append(_timed(world, lambda: run_round(loop)))
        if number % (case.rounds // case.checkpoints) == 0:
            since, before = loop.round, since
            write = _timed(world, loop.save)
    folder = Path(case.folder)
    written = max(folder.glob("*.h5")).stat().st_size if world.rank == 0 else 0
    members = {client for row in loop.history[before:since] for client in row["cohort"]}
    changed = 4 * sum(loop.federation.client_layouts[client].size for client in members)
    evaluate = _timed(world, loop.evaluation)
    memory = max(world.gather(peak_rss_mib(), "memory")) * 2**20
    ratio = 0.0
    if case.reference:
        pairs = _pairs(world, loop, _loop(world, case.reference, None), case)
        ratio, rounds = median(a / b for a, b in pairs), [a for a, _ in pairs]
    clients = loop.federation.task.clients
    return Cost(clients, setup, median(rounds), ratio, evaluate, write, written, changed, memory)


def _loop(world: Comm, settings: Mapping[str, Any], folder: Path | None) -> Loop:
    """Return a federation that is ready for its first round; collective."""
    from pfedmoe_mpi.federation.build import build
    from pfedmoe_mpi.federation.loop import Loop, SilentObserver

    loop = Loop(
        world, build(world, config.build({**settings, **ALWAYS}), warn=False), SilentObserver(), folder
    )
    loop.begin()
    return loop


def _pairs(world: Comm, loop: Loop, reference: Loop, case: Case) -> list[tuple[float, float]]:
    """Return the seconds of rounds of both in alternation, in alternating order; collective.

    The reference has trained as many rounds as the other one before.
    """
    for _ in range(case.rounds):
        run_round(reference)
    found = []
    for number in range(case.pairs):
        order = (loop, reference) if number % 2 else (reference, loop)
        seconds = {id(one): _timed(world, lambda one=one: run_round(one)) for one in order}  # type: ignore[misc]
        found.append((seconds[id(loop)], seconds[id(reference)]))
    return found


def _timed(world: Comm, work: Callable[[], object]) -> float:
    """Return the seconds of the slowest rank after a common start; collective."""
    world.gather(None, "bench")
    started = time.perf_counter()
    work()
    return float(max(world.gather(time.perf_counter() - started, "bench")))


def main(text: str) -> int:
    """Measure a case under MPI; return the exit code."""

    def work(world: Comm, code: str) -> int:
        world.timeout = ALWAYS["run.timeout"]
        cost = measure(world, Case(**json.loads(text)))
        if world.rank == 0:
            print(json.dumps(asdict(cost)), flush=True)
        return EXIT_DONE

    return session.under_mpi(work, {"case": text}, singleton=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).read_text(encoding="utf-8")))
