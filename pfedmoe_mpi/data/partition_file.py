"""Writing a partition as an HDF5 file."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np

from pfedmoe_mpi.config import Config
from pfedmoe_mpi.data.partition import Partition
from pfedmoe_mpi.data.split_file import labels_digest


def write_rows(path: Path, partition: Partition, labels: np.ndarray, config: Config) -> None:
    """Write the row numbers of every client, one group per part; `split_file.read_split` reads them.

    The groups `train`, `validation` and `test` hold `rows`, the concatenated row numbers of all clients, and
    `offsets` (N + 1): client k has rows[offsets[k] : offsets[k + 1]]. `unseen` are the clients that never
    train, `reserved` the rows that the server keeps. The attribute `labels` is the digest of the data's
    `labels` (n,), `client_names` a JSON list.

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
        file.attrs["labels"] = labels_digest(labels)
        file.attrs["client_names"] = json.dumps(partition.client_names)
        file.attrs["seed"] = config.seed
        for name, value in config.partition.model_dump().items():
            file.attrs[name] = value
