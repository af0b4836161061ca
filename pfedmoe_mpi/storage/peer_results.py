"""Result files of PFLlib and HtFLlib: `results/DATA_METHOD_GOAL_RUN.h5`, as their `save_results` writes them.

Each holds three vectors of one length or empty: `rs_test_acc`, `rs_test_auc` and `rs_train_loss`. Their
accuracy is the share of all clients' test samples that are classified right, measured every `-eg` rounds
before the round's training, the first time before round 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from pfedmoe_mpi.errors import UserError
from pfedmoe_mpi.storage import untrusted_hdf5
from pfedmoe_mpi.storage.untrusted_json import UnusableError

MOST = 1 << 24  # measurements
REMEDY = "name run folders, and files that PFLlib or HtFLlib wrote into its folder `results`"


class PeerResultError(UserError):
    """A file that is not a result of PFLlib or HtFLlib."""


@dataclass(frozen=True)
class PeerResult:
    """A run of another program: `name` without the run's number; `accuracy` by measurement, (M,), shares."""

    path: Path
    name: str
    accuracy: np.ndarray

    @property
    def best(self) -> float:
        return float(self.accuracy.max())

    @property
    def last(self) -> float:
        return float(self.accuracy[-1])


def read(path: Path) -> PeerResult:
    """Read a result file.

    Raises:
        PeerResultError: it is not one.
    """
    try:
        with h5py.File(path, "r") as file:
            accuracy = _accuracy(file)
    except untrusted_hdf5.FROM_HDF5 as error:
        problem = f"{path} is not a result file of PFLlib or HtFLlib: {error}"
        raise PeerResultError(problem, untrusted_hdf5.opening_remedy(error, path, REMEDY)) from error
    name, _, number = path.stem.rpartition("_")
    return PeerResult(path, name if number.isdecimal() and name else path.stem, accuracy)


def _accuracy(file: h5py.File) -> np.ndarray:
    """Return the accuracies; raise UnusableError if these are not shares, one after the other."""
    dataset = untrusted_hdf5.find_dataset(file, "rs_test_acc")
    if dataset is None:
        raise UnusableError("it has no rs_test_acc")
    if dataset.ndim != 1 or dataset.dtype.kind != "f" or not 0 < dataset.shape[0] <= MOST:
        raise UnusableError(f"rs_test_acc is {dataset.dtype} of shape {dataset.shape}")
    values = np.asarray(dataset[()], float)
    if not ((values >= 0) & (values <= 1)).all():
        raise UnusableError("rs_test_acc holds other numbers than shares from 0 to 1")
    return values
