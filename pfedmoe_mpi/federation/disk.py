"""The disk space of a run folder, estimated before round 1 from the sizes of vectors and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pfedmoe_mpi.config import Config
from pfedmoe_mpi.federation.federation import Federation

LINE, BY_CLASS_OR_RANK = 1_300, 60  # bytes of a line of metrics.jsonl, and of it by class and rank
BY_CLIENT = 48  # bytes of the numbers of a measured client: accuracy, loss, F1 and others


@dataclass(frozen=True)
class DiskUse:
    """What a run leaves at its end.

    Attributes:
        checkpoint: bytes of one checkpoint; its last part, the history, grows with the rounds.
        files: the most checkpoints between two writes: the newest ones, and best.h5 if it is older.
        metrics: bytes of metrics.jsonl and of the clients' numbers by round.
        frozen: bytes of the frozen tensors.
    """

    checkpoint: int
    files: int
    metrics: int
    frozen: int = 0

    @property
    def total(self) -> int:
        """Bytes at the end of the run; while a checkpoint is written, there is one more of them."""
        return self.files * self.checkpoint + self.metrics + self.frozen

    def line(self, keep: int) -> str:
        """Return the plan's line; `keep` is the setting run.keep."""
        kept = min(self.files, keep)
        frozen = f", frozen tensors {in_units(self.frozen)}" if self.frozen else ""
        best = " and best.h5" if self.files > keep else ""
        return (
            f"disk: up to {in_units(self.total)}: {kept} checkpoint{'s' if kept > 1 else ''}{best} of "
            f"{in_units(self.checkpoint)} each, metrics {in_units(self.metrics)}{frozen}; "
            f"one checkpoint more while it is written (run.keep = {keep})"
        )


def disk_use(
    settings: Config,
    state: int,
    clients: Sequence[int],
    rows: int,
    classes: int,
    ranks: int,
    frozen: int,
) -> DiskUse:
    """Return the disk use of a run.

    Args:
        state: numbers of the server's vector.
        clients: numbers of each client's vector.
        rows: rows of the data in the partition.
        frozen: numbers of the frozen tensors.
    """
    line = LINE + BY_CLASS_OR_RANK * (classes + ranks)
    measured = -(-settings.rounds // settings.eval.every)
    metrics = settings.rounds * line + measured * BY_CLIENT * min(settings.drawn_clients, len(clients))
    trained = min(1.0, settings.rounds * settings.cohort_size / len(clients))  # checkpoints hold no others
    checkpoint = 4 * (state + round(trained * sum(clients))) + 8 * rows + metrics
    return DiskUse(checkpoint, min(settings.run.keep + 1, settings.rounds), metrics, 4 * frozen)


def of_federation(federation: Federation, ranks: int) -> DiskUse:
    """Return the disk use of a federation's run."""
    splits = (federation.partition.train, federation.partition.validation, federation.partition.test)
    rows = sum(len(split.flat) for split in splits)
    clients = [layout.size for layout in federation.client_layouts]
    classes = federation.task.classes
    frozen = sum(layout.size for layout in federation.frozen.layouts.values())
    return disk_use(federation.config, federation.state_layout.size, clients, rows, classes, ranks, frozen)


def in_units(size: float) -> str:
    """Return bytes as text with three digits, in kB, MB, GB or TB."""
    for unit, divisor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= 0.9995 * divisor:
            number = size / divisor
            return f"{number:.3g} {unit}" if number < 999.5 else f"{number:,.0f} {unit}"
    return f"{size / 1e3:.3g} kB"
