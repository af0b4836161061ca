"""A client's test rows, read from the run's data again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.data.noise import with_noise
from pfedmoe_mpi.data.sources.open import open_dataset
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.federation import rebuilt
from pfedmoe_mpi.federation.plan import draw_partition


@dataclass(frozen=True, eq=False)
class TestRows:
    """A client's n test rows: their numbers in the data (n,) int64, ascending, and their samples and labels.

    `x` (n, *shape) are what `ClientModel.predict` takes, `y` (n,) int64 the classes.
    """

    rows: np.ndarray
    x: np.ndarray
    y: np.ndarray


def read(path: Path, client: int, code: Path | None = None, changed_code: bool = False) -> TestRows:
    """Return a client's test rows in the run of a checkpoint.

    Raises:
        CheckpointError: there is no such client, or the data are no longer those of the run.
        DataError: the data cannot be read.
    """
    with checkpoint.open_verified(path) as loaded:
        settings = rebuilt.configuration(loaded, code, changed_code)
        digest, last = loaded.identity["partition_digest"], loaded.clients - 1
    if not 0 <= client <= last:
        raise CheckpointError(f"{path} has no client {client}", f"use one of 0 to {last}")
    with open_dataset(settings.data, settings.seed, clients=settings.clients) as dataset:
        partition = draw_partition(settings, dataset)
        if partition.digest() != digest:
            problem = f"the data have changed since the run of {path}: they give another partition"
            raise CheckpointError(problem, f"restore data.path = {settings.data.path}")
        noise = settings.partition.noise
        fitted = with_noise(dataset.fitted(partition), partition, noise, settings.seed)
        rows = partition.test[client]
        return TestRows(rows, fitted.rows(rows), fitted.labels[rows])
