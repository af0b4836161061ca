"""What `bench` is doing, on stderr: every stage with its expected duration before it, then the time left."""

from __future__ import annotations

import math
import sys
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pfedmoe_mpi.federation.loop import Loop

INTERVAL = 15.0  # seconds between two lines of one stage
EVALUATIONS = 1.2  # the time of a round over that of its training, roughly


class Stage:
    """A stage of the measurement that consists of several pairs; `shown` is false on all ranks but one."""

    def __init__(self, name: str, expected: float, shown: bool = True) -> None:
        self._name, self._shown = name, shown
        self._started = self._last = time.monotonic()
        self._say(f"about {in_words(expected)}")

    def pair_done(self, done: int, pairs: int) -> None:
        """Print the time left, not more often than every INTERVAL; the pair that warms up counts, too."""
        now = time.monotonic()
        if done < pairs and now - self._last >= INTERVAL:
            left = (now - self._started) / done * (pairs - done)
            self._say(f"{done} of {pairs} pairs measured, about {in_words(left)} left")
            self._last = now

    def _say(self, text: str) -> None:
        if self._shown:
            announce(f"{self._name}: {text}")


def announce(text: str) -> None:
    """Print a line beside the table, which goes to stdout."""
    print(text, file=sys.stderr, flush=True)


def in_words(seconds: float) -> str:
    """Return a duration as text: seconds up to two minutes, then minutes."""
    return f"{max(1, round(seconds))} s" if seconds < 120 else f"{round(seconds / 60)} min"


def estimated_round(loop: Loop) -> float:
    """Return the seconds of a round as expected from one batch of every client of this rank.

    The ranks have about the same amount of work, so that of one rank is enough. No client changes.
    """
    from pfedmoe_mpi.core.fixedpoint import NotFiniteError
    from pfedmoe_mpi.core.turn import Turn

    federation, method = loop.federation, loop.federation.method
    engine = replace(federation.engine, poll=lambda: None)  # no stop alone: the other ranks wait

    def seconds(client: int, role: str) -> float:
        member, size = federation.clients[client], engine.train.batch
        whole = member.splits["train"]
        few = replace(member, splits={**member.splits, "train": whole.rows(slice(0, size))})
        turn = Turn(engine, method.loss, few, federation.parts(few, loop.state), 1, role)
        started = time.perf_counter()
        with suppress(NotFiniteError):
            method.client_step(turn)
        return (time.perf_counter() - started) * math.ceil(len(whole) / size)

    members = [(client, role) for client, role in method.cohort(1) if client in federation.clients]
    for client, role in members[:1]:
        seconds(client, role)  # to warm up
    return EVALUATIONS * sum(seconds(client, role) for client, role in members)
