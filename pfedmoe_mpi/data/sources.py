"""The sources by name, and the two that need no file of the user's: digits and synthetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from pfedmoe_mpi.data.dataset import Dataset, HeldRows, Loaded, describe, user_path
from pfedmoe_mpi.data.folder import load_folder
from pfedmoe_mpi.data.hdf5 import open_hdf5
from pfedmoe_mpi.data.heart import load_heart
from pfedmoe_mpi.data.npz import load_npz
from pfedmoe_mpi.data.text import load_text
from pfedmoe_mpi.data.vision import load_torchvision
from pfedmoe_mpi.data.words import load_words
from pfedmoe_mpi.errors import DataError
from pfedmoe_mpi.sections import Data
from pfedmoe_mpi.seeds import numpy_generator

_DIGITS = Path(__file__).parents[1] / "assets" / "digits.h5"


def open_dataset(
    settings: Data, seed: int, *, clients: int, download: bool = False, check: bool = True
) -> Dataset:
    """Open the data that `settings` name.

    `seed` and `clients` serve the synthetic source only. `download` lets torchvision fetch what is missing;
    ranks never set it. `check=False` leaves the search of a whole HDF5 file for NaN to another rank; rows are
    searched again when they are read.

    Raises:
        DataError: data that are missing, unreadable, empty, or of unusable shapes, labels or values; a path
            for a source that reads none.
    """
    loaded = _load(settings, seed, clients, download, check)
    try:
        return describe(loaded, settings)
    except BaseException:
        loaded.store.close()
        raise


def _load(settings: Data, seed: int, clients: int, download: bool, check: bool) -> Loaded:
    readers: dict[str, Callable[[], Loaded]] = {
        "digits": lambda: load_digits(settings),
        "synthetic": lambda: draw_synthetic(settings, seed, clients),
        "torchvision": lambda: load_torchvision(settings, download),
        "folder": lambda: load_folder(user_path(settings), settings.size),
        "hdf5": lambda: open_hdf5(user_path(settings), check),
        "npz": lambda: load_npz(user_path(settings)),
        "heart": lambda: load_heart(user_path(settings)),
        "text": lambda: load_text(user_path(settings), settings),
        "words": lambda: load_words(user_path(settings), settings),
    }
    if settings.path and settings.source in {"digits", "synthetic"}:
        problem = f"data.source {settings.source} reads no file, but data.path is {settings.path}"
        raise DataError(problem, f"--data.source tells what it is: {', '.join(list(readers)[2:])}")
    return readers[settings.source]()


def load_digits(settings: Data) -> Loaded:
    """1,797 handwritten digits, 1 × 32 × 32 uint8, or `data.size` pixels a side.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (CC BY 4.0), the
    part that scikit-learn ships: 8 × 8 pixels of 0..16, here repeated and stretched to 0..255.
    """
    with h5py.File(_DIGITS, "r", locking="best-effort") as file:
        x, labels = file["x"][()], file["y"][()]
    size = settings.size or 32
    nearest = np.arange(size) * x.shape[1] // size
    grey = (x.astype(np.uint16) * 255 + 8) // 16
    images = grey.astype(np.uint8)[:, None, nearest[:, None], nearest]
    return Loaded("digits", "data.source digits", HeldRows(images), labels)


def draw_synthetic(settings: Data, seed: int, clients: int) -> Loaded:
    """Gaussian blobs: a coarse pattern per class plus noise, 3 × size × size uint8, classes in equal parts.

    Row i belongs to natural client i mod `clients`.
    """
    n, classes, size = settings.samples, settings.classes, settings.size or 32
    if n < max(classes, clients):
        raise DataError(
            f"data.samples {n} is below the number of {'classes' if n < classes else 'clients'}",
            f"set --data.samples to {max(classes, clients)} or more",
        )
    generator = numpy_generator(seed, "synthetic")
    coarse = generator.standard_normal((classes, 3, 4, 4), dtype=np.float32)
    nearest = np.arange(size) * 4 // size
    pattern = 128 + 32 * coarse[:, :, nearest[:, None], nearest]
    labels = generator.permutation(np.arange(n) % classes)
    x = np.empty((n, 3, size, size), np.uint8)
    for start in range(0, n, 1024):
        block = pattern[labels[start : start + 1024]]
        noise = generator.standard_normal(block.shape, dtype=np.float32)
        x[start : start + 1024] = np.rint(block + 48 * noise).clip(0, 255)
    return Loaded(
        "synthetic",
        "data.source synthetic",
        HeldRows(x),
        labels,
        client=np.arange(n) % clients,
    )
