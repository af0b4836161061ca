"""Live curves of a run: TensorBoard events of every round, written by rank 0."""

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
# Entries of a metrics row that become curves; a group is a heading in TensorBoard.
GROUPS = ("accuracy", "accuracy_cohort", "accuracy_unseen", "accuracy_validation", "seconds", "bytes")
NUMBERS = ("train_loss", "mpi_bytes", "rss_mb", "simulated_time")


def check(settings: Config) -> None:
    """Raise ConfigError if `run.tensorboard` is set and the package tensorboard is missing."""
    if settings.run.tensorboard and not find_spec("tensorboard"):
        remedy = "pip install 'pfedmoe_mpi[tensorboard]', or remove --run.tensorboard"
        raise ConfigError(
            "run.tensorboard = true needs the package tensorboard, which is not installed", remedy
        )


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return a round's points by curve: `accuracy/mean`, `seconds/train`, `train_loss`, …, without nulls."""
    points = {name: row.get(name) for name in NUMBERS}
    points |= {f"{group}/{name}": value for group in GROUPS for name, value in (row.get(group) or {}).items()}
    return {name: float(value) for name, value in points.items() if value is not None}


class Curves:
    """The curves of a run, in RUN/tensorboard.

    Every start writes the whole history again and marks earlier points as replaced (`purge_step`), so that a
    killed run leaves neither gaps nor duplicate points. An error never ends the run: one warning is printed,
    and no more curves are written.
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
        """Add a round and flush it to the disk."""
        self._add(row)
        self._attempt(lambda writer: writer.flush())

    def close(self) -> None:
        """Flush and close the file."""
        self._attempt(lambda writer: writer.close())

    def _add(self, row: Mapping[str, Any]) -> None:
        for name, value in scalars(row).items():
            self._attempt(lambda writer, n=name, v=value: writer.add_scalar(n, v, row["round"]))

    def _attempt(self, work: Any) -> None:
        if self._writer is not None:
            try:
                work(self._writer)
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Stop writing curves; no error of the package tensorboard may end a run."""
        writer, self._writer = self._writer, None
        with suppress(Exception):
            writer.close()
        LOGGER.error("tensorboard: %s", error)
        print(f"warning: no more TensorBoard curves: {error}", file=sys.stderr, flush=True)
