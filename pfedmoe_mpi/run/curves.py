"""Curves to look at while a run goes on: TensorBoard events of every round, written by rank 0."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pfedmoe_mpi.config import Config
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.log import LOGGER

FOLDER = "tensorboard"
# What of a row becomes a curve: a group is a heading in TensorBoard.
GROUPS = ("accuracy", "accuracy_cohort", "accuracy_unseen", "accuracy_validation", "seconds", "bytes")
NUMBERS = ("train_loss", "mpi_bytes", "rss_mb", "simulated_time")


def check(settings: Config) -> None:
    """Raise ConfigError where curves are wanted and the package that writes them is missing."""
    if settings.run.tensorboard and not find_spec("tensorboard"):
        remedy = "pip install 'pfedmoe_mpi[tensorboard]', or leave --run.tensorboard out"
        raise ConfigError("run.tensorboard needs the package tensorboard, which is not installed", remedy)


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The curves' points of a round: `accuracy/mean`, `seconds/train`, `train_loss`, …; no nulls."""
    found = {name: row.get(name) for name in NUMBERS}
    found |= {f"{group}/{name}": value for group in GROUPS for name, value in (row.get(group) or {}).items()}
    return {name: float(value) for name, value in found.items() if value is not None}


class Curves:
    """Writes RUN/tensorboard. The whole history is written at every start, and what lies there before it is
    marked as overtaken (`purge_step`): so a killed run leaves neither a gap nor a point twice.

    It never ends a run: an error is told once, and there are no more curves.
    """

    def __init__(self, run: Path, history: Sequence[Mapping[str, Any]]) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / FOLDER), purge_step=0)
        except Exception as error:
            self._give_up(error)
        for row in history:
            self._add(row)

    def round_done(self, row: Mapping[str, Any]) -> None:
        """Add a round; it is on the disk when this returns."""
        self._add(row)
        self._careful(lambda writer: writer.flush())

    def close(self) -> None:
        """Write what is left."""
        self._careful(lambda writer: writer.close())

    def _add(self, row: Mapping[str, Any]) -> None:
        for name, value in scalars(row).items():
            self._careful(lambda writer, n=name, v=value: writer.add_scalar(n, v, row["round"]))

    def _careful(self, work: Any) -> None:
        if self._writer is not None:
            try:
                work(self._writer)
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """A curve is worth no run, whatever goes wrong in a package that is not ours."""
        writer, self._writer = self._writer, None
        with suppress(Exception):
            writer.close()
        LOGGER.error("tensorboard: %s", error)
        print(f"warning: no more TensorBoard curves: {error}", file=sys.stderr, flush=True)
