"""Opening a data set from any source by name.

To add a format, write its reader in a file beside this one, and name it in `_load` below and in the choices
of `data.source` in `config/sections.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.dataset import Dataset, SourceData, build_dataset, user_path
from pfedmoe_mpi.data.doubts import doubts
from pfedmoe_mpi.data.sources.builtin import draw_synthetic, load_digits
from pfedmoe_mpi.data.sources.folder import load_folder
from pfedmoe_mpi.data.sources.hdf5 import open_hdf5
from pfedmoe_mpi.data.sources.heart import load_heart
from pfedmoe_mpi.data.sources.leaf import load_leaf
from pfedmoe_mpi.data.sources.next_word import load_words
from pfedmoe_mpi.data.sources.npz import load_npz
from pfedmoe_mpi.data.sources.own_code import load_own
from pfedmoe_mpi.data.sources.table import load_table
from pfedmoe_mpi.data.sources.text_csv import load_text
from pfedmoe_mpi.data.sources.tff import load_tff
from pfedmoe_mpi.data.sources.torchvision_sets import load_torchvision
from pfedmoe_mpi.data.summary import read_sample, summarise
from pfedmoe_mpi.errors import DataError
from pfedmoe_mpi.user_code import is_reference

_OURS = {"digits", "synthetic"}  # sources without a file of the user's


def open_dataset(
    settings: Data, seed: int, *, clients: int, download: bool = False, check: bool = True
) -> Dataset:
    """Open the data set of `settings`.

    Only the synthetic source uses `seed` and `clients`. `download` lets torchvision fetch missing files;
    ranks never set it. `check=False` skips the search of a whole HDF5 file for NaN, copies and doubtful
    values, and the summary, which one rank does for all; rows are checked again when they are read.

    Raises:
        DataError: the data are missing, unreadable, empty, or have unusable shapes, labels or values, or
            `data.path` or columns are set for a source without them.
    """
    source = _load(settings, seed, clients, download, check)
    try:
        data = build_dataset(source, settings)
        if not check:
            return data
        sample = read_sample(data)
        found = () if settings.source in _OURS else tuple(doubts(source, data, sample))
        summary = summarise(data, source.where, sample)
        return replace(data, summary=summary, warnings=(*data.warnings, *found))
    except BaseException:
        source.store.close()
        raise


def print_summary(dataset: Dataset) -> None:
    """Print what the source took the data to be, beside the output of a command; only one rank calls it."""
    print("\n".join(dataset.summary), file=sys.stderr, flush=True)


def print_warnings(dataset: Dataset) -> None:
    """Print the data set's warnings; only one rank calls it."""
    for warning in dataset.warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _load(settings: Data, seed: int, clients: int, download: bool, check: bool) -> SourceData:
    readers: dict[str, Callable[[], SourceData]] = {
        "digits": lambda: load_digits(settings),
        "synthetic": lambda: draw_synthetic(settings, seed, clients),
        "torchvision": lambda: load_torchvision(settings, download),
        "folder": lambda: load_folder(user_path(settings), settings.size),
        "hdf5": lambda: open_hdf5(user_path(settings), check),
        "npz": lambda: load_npz(user_path(settings)),
        "tff": lambda: load_tff(user_path(settings), settings),
        "table": lambda: load_table(user_path(settings), settings),
        "hf": lambda: load_table(user_path(settings), settings),
        "leaf": lambda: load_leaf(user_path(settings), settings),
        "heart": lambda: load_heart(user_path(settings)),
        "text": lambda: load_text(user_path(settings), settings),
        "words": lambda: load_words(user_path(settings), settings),
    }
    if is_reference(settings.source):
        return load_own(settings.source, settings.path)
    if settings.path and settings.source in _OURS:
        raise DataError(
            f"data.source = {settings.source} reads no file, but data.path = {settings.path}",
            f"set --data.source to the file's format: {', '.join(list(readers)[2:])}",
        )
    for name in ("label", "client", "split", "image", "text", "categorical", "ignore"):
        if getattr(settings, name) and settings.source not in {"table", "hf"}:
            raise DataError(
                f"data.{name} names columns of a table, but data.source = {settings.source}",
                f"set --data.source table or hf, or remove --data.{name}",
            )
    return readers[settings.source]()
