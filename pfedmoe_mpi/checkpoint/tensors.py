"""The tensors of a vector as HDF5 datasets of their names, and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from pfedmoe_mpi.core.flat import Entry, Layout
from pfedmoe_mpi.storage import untrusted_hdf5
from pfedmoe_mpi.storage.untrusted_json import UnusableError


def write(file: Any, layout: Layout, vector: np.ndarray) -> None:
    """Write the tensors of a vector (layout.size,) into an HDF5 file."""
    for entry in layout.entries:
        file[key(entry)] = vector[entry.offset : entry.offset + entry.size].reshape(entry.shape)


def read(file: Any, layout: Layout) -> np.ndarray:
    """Return the tensors of a layout one after the other, (layout.size,) float32.

    A part that is a single tensor may have NaN, which marks values that are not yet defined.

    Raises:
        UnusableError: a tensor is missing, of another shape or not finite.
    """
    return np.concatenate([np.empty(0, np.float32), *(_tensor(file, entry) for entry in layout.entries)])


def key(entry: Entry) -> str:
    """Return the path of a tensor's dataset."""
    return entry.name.rstrip("/")  # a part that is a single tensor has no name below the part's


def _tensor(file: Any, entry: Entry) -> np.ndarray:
    """Return the numbers of one tensor, (entry.size,) float32."""
    dataset = untrusted_hdf5.find_dataset(file, key(entry))
    if dataset is None or dataset.shape != entry.shape or dataset.dtype != np.float32:
        raise UnusableError(f"{key(entry)} is not float32 of shape {entry.shape}")
    values = np.asarray(dataset[()])
    undefined = np.isnan(values) if entry.name.endswith("/") else False
    if not (np.isfinite(values) | undefined).all():
        raise UnusableError(f"{key(entry)} is not finite")
    return values.reshape(-1)
