"""The sources by name, and the two that need no file of the user's: digits and synthetic."""

from __future__ import annotations

from collections.abc import Callable

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.dataset import Dataset, Loaded, describe, user_path
from pfedmoe_mpi.data.sources.builtin import draw_synthetic, load_digits
from pfedmoe_mpi.data.sources.folder import load_folder
from pfedmoe_mpi.data.sources.hdf5 import open_hdf5
from pfedmoe_mpi.data.sources.heart import load_heart
from pfedmoe_mpi.data.sources.next_word import load_words
from pfedmoe_mpi.data.sources.npz import load_npz
from pfedmoe_mpi.data.sources.text_csv import load_text
from pfedmoe_mpi.data.sources.torchvision_sets import load_torchvision
from pfedmoe_mpi.errors import DataError


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
