"""Training many runs: one after the other on all ranks, or several at once, each on a part of the ranks."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import TextIO

from pfedmoe_mpi.errors import (
    EXIT_DONE,
    EXIT_FAULT,
    EXIT_STOPPED,
    EXIT_USER,
    ConfigError,
    MessageError,
    RunError,
    StoppedError,
    UserError,
)
from pfedmoe_mpi.mpi.comm import TIMEOUT, Comm
from pfedmoe_mpi.mpi.part import divide
from pfedmoe_mpi.reproduce.grid import TableRun

Train = Callable[[Comm, TableRun], int]  # trains a run on all ranks of a communicator; returns an exit code


@dataclass
class Outcome:
    """How runs ended: `failed`, the exit code of each run that cannot continue, and whether all were begun.

    `stopped`: the exit code of a stop before all were begun or finished, else EXIT_DONE.
    """

    failed: dict[str, int] = field(default_factory=dict)
    stopped: int = EXIT_DONE

    @property
    def code(self) -> int:
        """The exit code of all runs together."""
        if self.stopped or not self.failed:
            return self.stopped
        return EXIT_FAULT if EXIT_FAULT in self.failed.values() else EXIT_USER


def check_together(together: int, world: Comm) -> None:
    """Refuse more runs at once than there are ranks.

    Raises:
        ConfigError: on all ranks.
    """
    if together > world.size:
        ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
        fewer = "remove --together" if world.size == 1 else f"--together {world.size}"
        raise ConfigError(
            f"--together = {together}, but the job has {ranks}, and every run needs one",
            f"start with mpirun -n {together}, or {fewer}",
        )


def shares(seconds: Mapping[str, float], parts: int) -> list[list[str]]:
    """Return the runs of each part, so that parts end at about the same time: each run, the longest first, is
    given to the part with the least work. Within a part they keep their order.
    """
    loads, names = [0.0] * parts, [[] for _ in range(parts)]  # type: tuple[list[float], list[list[str]]]
    for name in sorted(seconds, key=lambda name: -seconds[name]):
        least = loads.index(min(loads))
        loads[least] += seconds[name]
        names[least].append(name)
    return [[name for name in seconds if name in set(part)] for part in names]


def play(
    world: Comm, runs: Sequence[TableRun], seconds: Mapping[str, float], parts: int, train: Train
) -> Outcome:
    """Train runs on `parts` parts of the ranks at once; collective.

    A run that cannot continue is reported, and the others are trained all the same. A stop ends all parts.

    Args:
        seconds: the estimated time of each run by its name.
    """
    numbered = {run.name: (f"run {number} of {len(runs)}", run) for number, run in enumerate(runs, 1)}
    if parts == 1:
        return _play_in_order(world, numbered, train, prefixed=False)
    number, part = divide(world, parts)
    mine = shares({run.name: seconds[run.name] for run in runs}, parts)[number]
    part_outcome = _play_in_order(part, {name: numbered[name] for name in mine}, train, prefixed=True)
    world.timeout = math.inf  # the other parts may have hours left, and watch themselves
    outcomes = world.gather(part_outcome, "the end of all runs")
    world.timeout = TIMEOUT
    failed = {name: code for outcome in outcomes for name, code in outcome.failed.items()}
    stops = {outcome.stopped for outcome in outcomes}
    stopped = next((code for code in (EXIT_STOPPED, EXIT_FAULT) if code in stops), EXIT_DONE)
    return Outcome({run.name: failed[run.name] for run in runs if run.name in failed}, stopped)


def _play_in_order(
    comm: Comm, runs: Mapping[str, tuple[str, TableRun]], train: Train, prefixed: bool
) -> Outcome:
    outcome = Outcome()
    for name, (number, run) in runs.items():
        with _prefix(f"{name} | " if prefixed else ""):
            if any(comm.gather(comm.stop_requested(), "stop")):
                _print(comm, f"stopped before run {name}; run the same command again to resume")
                outcome.stopped = EXIT_STOPPED
                return outcome
            _print(comm, f"{number}" if prefixed else f"\n{number}: {name}")
            _play_one(comm, run, train, outcome)
            if outcome.stopped:
                return outcome
    return outcome


def _play_one(comm: Comm, run: TableRun, train: Train, outcome: Outcome) -> None:
    """Train a run, and add to the outcome if it was stopped or cannot continue."""
    try:
        outcome.stopped = train(comm, run)
        if outcome.stopped:
            _print(comm, "run the same command again to resume")
    except StoppedError:  # raised on all ranks, where there is nothing to save
        _print(comm, f"stopped by {comm.stopped_by or 'another rank'}; run the same command again to resume")
        outcome.stopped = EXIT_FAULT
    except (RunError, UserError) as error:
        _print_error(comm, run, error)
        code = EXIT_USER if isinstance(error, UserError) else EXIT_FAULT
        if any(comm.gather(comm.stop_requested(), "stop")):
            outcome.stopped = code
        else:
            outcome.failed[run.name] = code


def _print(comm: Comm, text: str) -> None:
    if comm.rank == 0:
        print(text, flush=True)


def _print_error(comm: Comm, run: TableRun, error: MessageError) -> None:
    if comm.rank == 0:
        print(f"error: {run.name}: {error}", file=sys.stderr, flush=True)


class _PrefixedLines(io.TextIOBase):
    """A stream that writes whole lines with a prefix, so that lines of several processes stay apart."""

    def __init__(self, target: TextIO, prefix: str) -> None:
        self._target, self._prefix, self._line = target, prefix, ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._target.encoding

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        self._target.write("".join(f"{self._prefix}{line}".rstrip() + "\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        self._target.flush()


@contextmanager
def _prefix(prefix: str) -> Iterator[None]:
    """Put a prefix before every line that this process prints; without one change nothing."""
    if not prefix:
        yield
        return
    out, err = _PrefixedLines(sys.stdout, prefix), _PrefixedLines(sys.stderr, prefix)
    with redirect_stdout(out), redirect_stderr(err):
        yield
