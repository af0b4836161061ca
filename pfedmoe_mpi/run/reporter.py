"""What people see of a run while it goes on: the run folder's files, the terminal, the logs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.federation import metrics
from pfedmoe_mpi.log import LOGGER
from pfedmoe_mpi.run import console, curves
from pfedmoe_mpi.run.folder import RunFolder


@dataclass
class Reporter:
    """Rank 0 writes the run folder and the terminal; the other ranks only log.

    A file that cannot be written is told once; training goes on, and `metrics.jsonl` is brought up to date as
    soon as it can be: all that is in it is in the checkpoints too.
    """

    folder: RunFolder
    keep: int
    progress: console.Progress | None
    curves: curves.Curves | None = None
    _behind: set[str] = field(default_factory=set)

    def pretrained(self, line: str) -> None:
        if line and self.progress:
            self.event("pretrained", result=line)
            print(line, flush=True)

    def round_done(self, row: metrics.Row, history: Sequence[metrics.Row]) -> None:
        if self.progress:
            again = "metrics.jsonl" in self._behind
            write = partial(self.folder.rewrite_metrics, history) if again else None
            self._careful("metrics.jsonl", write or partial(self.folder.append_metrics, row))
            self.progress.round_done(row)
        if self.curves:
            self.curves.round_done(row)

    def dropped(self, round: int, clients: Sequence[int]) -> None:
        if clients:
            LOGGER.warning("round %d: left out clients %s, not finite", round, clients)
            if self.progress:
                self.event("dropped", round=round, clients=list(clients))
                listed = ", ".join(map(str, clients))
                print(f"round {round}: left out clients {listed}: vectors that are not finite", flush=True)

    def written(self, path: Path, history: Sequence[metrics.Row], partial: bool) -> None:
        if self.progress:
            self._careful("checkpoints", lambda: self._tidy(path, history, partial))

    def not_written(self, error: CheckpointError) -> None:
        LOGGER.error(str(error))
        if self.progress:
            print(f"warning: {error}", file=sys.stderr, flush=True)
            self.event("not written", error=error.problem)

    def event(self, kind: str, **facts: Any) -> None:
        """A line in events.jsonl, by rank 0."""
        if self.progress:
            self._careful("events.jsonl", lambda: self.folder.event(kind, **facts))

    def close(self) -> None:
        """Restore the terminal and close the curves' file."""
        for part in (self.progress, self.curves):
            if part:
                part.close()

    def _tidy(self, path: Path, history: Sequence[metrics.Row], partial: bool) -> None:
        if not partial and history:
            held = self.folder.best_round()
            rounds = [history[-1]["round"], *([held] if held else [])]
            top = metrics.best(history, rounds)
            if top and top["round"] == history[-1]["round"]:  # again too: what best.h5 was may be damaged
                self.folder.mark_best(path)
        self.folder.keep_newest(self.keep, path)

    def _careful(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
            self._behind.discard(name)
        except OSError as error:
            LOGGER.error("%s: %s", name, error)
            if name not in self._behind:
                print(f"warning: {name} cannot be kept up to date: {error}", file=sys.stderr, flush=True)
            self._behind.add(name)
