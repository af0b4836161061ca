"""The record of a run while it trains: the run folder's files, the terminal and the logs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.federation import metrics, selection
from pfedmoe_mpi.log import LOGGER
from pfedmoe_mpi.run import console, curves
from pfedmoe_mpi.run.folder import RunFolder


@dataclass
class Reporter:
    """Rank 0 writes the run folder and the terminal; the other ranks only log.

    If a file cannot be written, one warning is printed and training continues. `metrics.jsonl` and the
    clients' numbers are rewritten as soon as that is possible; nothing is lost, because the checkpoints hold
    the same rows.
    """

    folder: RunFolder
    keep: int
    forked: int  # rounds of another run, none of which is the best of this one
    progress: console.Progress | None  # None on the other ranks
    curves: curves.Curves | None = None
    _outdated: set[str] = field(default_factory=set)  # files whose last write failed

    def pretrained(self, line: str) -> None:
        """Report how the training before round 1 went."""
        if line and self.progress:
            self.event("pretrained", result=line)
            print(line, flush=True)

    def client_trained(self, round: int, done: int, members: int) -> None:
        """Show how far rank 0 is within the round."""
        if self.progress:
            self.progress.client_trained(round, done, members)

    def round_done(self, row: metrics.Row, history: Sequence[metrics.Row]) -> None:
        """Report a complete round."""
        if self.progress:
            if "metrics.jsonl" in self._outdated:
                self._attempt("metrics.jsonl", lambda: self.folder.rewrite_metrics(history))
            else:
                self._attempt("metrics.jsonl", lambda: self._append(row, history))
            self.progress.round_done(row)
        if self.curves:
            self.curves.round_done(row)

    def _append(self, row: metrics.Row, history: Sequence[metrics.Row]) -> None:
        self.folder.append_measured(history)  # first, so that every row of metrics.jsonl has its columns
        self.folder.append_metrics(row)

    def dropped(self, round: int, clients: Sequence[int]) -> None:
        """Report the clients whose vectors were not finite and are not in the round's sum."""
        if clients:
            LOGGER.warning("round %d: left out clients %s, not finite", round, clients)
            if self.progress:
                self.event("dropped", round=round, clients=list(clients))
                listed = ", ".join(map(str, clients))
                print(f"round {round}: left out clients {listed}: their vectors are not finite", flush=True)

    def check_folder(self) -> None:
        """Raise OSError on rank 0 if the path of the run folder leads to another one now."""
        if self.progress:
            self.folder.check()

    def written(self, path: Path, history: Sequence[metrics.Row], candidate: bool) -> None:
        """Update best.h5 and remove the checkpoints that a new one replaces."""
        if self.progress:
            self._attempt("checkpoints", lambda: self._tidy(path, history, candidate))

    def complete_best(self) -> None:
        """Make best.h5 complete at the end of a run, and remove the files that only it needed."""
        newest = checkpoint.newest_first(self.folder.checkpoints)[:1]
        if self.progress and newest:
            self._attempt("best.h5", lambda: self.folder.complete_best(self.keep, newest[0]))

    def not_written(self, error: CheckpointError) -> None:
        """Report a checkpoint that could not be written."""
        LOGGER.error(str(error))
        if self.progress:
            print(f"warning: {error}", file=sys.stderr, flush=True)
            self.event("not written", error=error.problem)

    def event(self, kind: str, **facts: Any) -> None:
        """Append a line to events.jsonl, on rank 0."""
        if self.progress:
            self._attempt("events.jsonl", lambda: self.folder.event(kind, **facts))

    def close(self) -> None:
        """Restore the terminal and close the curves' file."""
        for part in (self.progress, self.curves):
            if part:
                part.close()

    def _tidy(self, path: Path, history: Sequence[metrics.Row], candidate: bool) -> None:
        if candidate and history:
            newest, marked = history[-1]["round"], self.folder.best_round()
            top = selection.best(history, [newest, marked] if marked else [newest], after=self.forked)
            if top and top["round"] == newest:  # even if marked == newest: best.h5 may be damaged
                self.folder.mark_best(path)
        self.folder.keep_newest(self.keep, path)

    def _attempt(self, name: str, work: Callable[[], None]) -> None:
        """Do `work` on a file; print a warning the first time that it fails."""
        try:
            work()
            self._outdated.discard(name)
        except OSError as error:
            LOGGER.error("%s: %s", name, error)
            if name not in self._outdated:
                print(f"warning: {name} cannot be kept up to date: {error}", file=sys.stderr, flush=True)
            self._outdated.add(name)
