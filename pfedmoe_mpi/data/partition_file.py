"""Writing a partition as an HDF5 file."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from pfedmoe_mpi.config import Config
from pfedmoe_mpi.data.partition import Partition


def write_rows(path: Path, partition: Partition, config: Config) -> None:
    """Write the row numbers of every client, one group per part.

    The groups `train`, `validation` and `test` hold `rows`, the concatenated row numbers of all clients, and
    `offsets` (N + 1): client k has rows[offsets[k] : offsets[k + 1]]. `unseen` are the clients that never
    train, `reserved` the rows that the server keeps.

    Raises:
        OSError, RuntimeError: from the HDF5 library.
    """
    with h5py.File(path, "w", locking="best-effort") as file:
        parts = {"train": partition.train, "validation": partition.validation, "test": partition.test}
        for name, clients in parts.items():
            file[f"{name}/rows"] = clients.flat
            file[f"{name}/offsets"] = clients.offsets
        file["unseen"] = np.array(sorted(partition.unseen), np.int64)
        file["reserved"] = partition.reserved
        file.attrs["digest"] = partition.digest()
        file.attrs["seed"] = config.seed
        for name, value in config.partition.model_dump().items():
            file.attrs[name] = value
