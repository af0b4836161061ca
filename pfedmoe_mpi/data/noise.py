"""Feature skew: Gaussian noise on the samples, stronger from client to client."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from pfedmoe_mpi.core.seeds import numpy_generator
from pfedmoe_mpi.data.dataset import ChangedRows, Dataset
from pfedmoe_mpi.data.owners import NO_CLIENT
from pfedmoe_mpi.data.partition import Partition


@dataclass(frozen=True, eq=False)
class NoisyRows(ChangedRows):
    """Samples of another store with noise added when they are read.

    `level` (N + 1, *…) is the std of each client's noise in the samples' own numbers; the last is for rows
    without a client. The noise of a row is drawn from the row's own address, so it is the same at every
    reading and on any rank, for training and test rows alike. Samples keep their type, so that they take no
    more memory: uint8 is rounded and limited to 0..255.
    """

    owner: np.ndarray = field(repr=False)
    level: np.ndarray = field(repr=False)
    seed: int

    def read(self, index: np.ndarray) -> np.ndarray:
        x = self.store.read(index)
        for sample, row in zip(x, index.tolist(), strict=True):
            level = self.level[self.owner[row]]
            if level.any():
                generator = numpy_generator(self.seed, f"partition.noise/{row}")
                noisy = sample + level * generator.standard_normal(self.shape, np.float32)
                sample[...] = np.clip(np.rint(noisy), 0, 255) if self.dtype == np.uint8 else noisy
        return x


def with_noise(dataset: Dataset, partition: Partition, sigma: float, seed: int) -> Dataset:
    """Return the data with noise of std sigma · k / N on the samples of client k of 0..N-1.

    Noise-based feature imbalance of NIID-Bench (Li et al., ICDE 2022, arXiv 2102.02079). The std is in units
    of the range 0 to 1 of images (uint8 / 255, floats as they are), and of the std of features, if the data
    have one. Departures: the paper calls the level a variance, the authors' code takes it as a std, as here;
    the code divides by N - 1, draws anew at every reading, and does not limit pixels to 0..255.
    """
    if not sigma:
        return dataset
    clients = partition.clients
    owner = np.full(len(dataset), NO_CLIENT, np.int64)
    for part in (partition.train, partition.validation, partition.test):
        for client, rows in enumerate(part):
            owner[rows] = client
    unit = np.array([255 if dataset.dtype == np.uint8 else 1], np.float32)
    if len(dataset.shape) == 1 and dataset.std:
        unit = unit * np.array(dataset.std, np.float32)
    share = np.append(np.arange(clients) / clients, 0).astype(np.float32)
    level = np.float32(sigma) * share.reshape(-1, *[1] * len(dataset.shape)) * unit
    return replace(dataset, store=NoisyRows(dataset.store, owner, level, seed))
