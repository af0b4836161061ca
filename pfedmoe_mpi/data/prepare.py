"""Data and partitions written as files: any source as one HDF5 file, a partition as HDF5 or as a picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi.config import Config
from pfedmoe_mpi.data.dataset import Dataset
from pfedmoe_mpi.data.partition import Partition
from pfedmoe_mpi.data.sources import open_dataset
from pfedmoe_mpi.errors import DataError

_CHUNK = 64 << 10  # bytes: a rank's rows lie scattered, and every chunk one of them is in is read whole
_BLOCK = 16 << 20  # bytes moved at once
_SHOWN = 40  # clients and classes a heat map in text shows
_SHADES = " ░▒▓█"


def prepare(config: Config, out: Path) -> str:
    """Write the data that `config.data` names as one HDF5 file, of which a rank reads only the rows it needs.

    torchvision may download here. Source `hdf5` reads the file back as the same data set.

    Returns:
        One line about what was written.

    Raises:
        DataError: unusable data, or `out` exists or cannot be written; then nothing is left behind.
    """
    _refuse_existing(out)
    with open_dataset(config.data, config.seed, clients=config.clients, download=True) as data:
        if data.fit:
            raise DataError(
                f"{data.name} is made ready by what each client trains on, and cannot be prepared before",
                f"run on --data.source {config.data.source} itself; the first rank reads it and sends rows",
            )
        _write(out, lambda file: _write_data(file, data))
        return (
            f"{out}: {len(data)} samples of {' × '.join(map(str, data.shape))} {data.dtype}, "
            f"{data.classes} classes, {out.stat().st_size / 2**20:.1f} MiB"
        )


def _write_data(file: Any, data: Dataset) -> None:
    row_bytes = data.dtype.itemsize * int(np.prod(data.shape))
    rows = min(len(data), max(1, _CHUNK // row_bytes))
    x = file.create_dataset("x", (len(data), *data.shape), data.dtype, chunks=(rows, *data.shape))
    step = rows * max(1, _BLOCK // (rows * row_bytes))
    for start in range(0, len(data), step):
        index = np.arange(start, min(start + step, len(data)))
        x[start : start + step] = data.rows(index)
    file["y"] = data.labels
    if data.client is not None:
        file["client"] = data.client
    if data.official_test is not None:
        file["official_test"] = data.official_test
    file.create_dataset("class_names", data=list(data.class_names), dtype=h5py.string_dtype())
    file.attrs["name"] = data.name
    if data.mean:
        file.attrs["mean"], file.attrs["std"] = data.mean, data.std


def write_partition(config: Config, out: Path) -> str:
    """Compute the partition of `config`; write its row numbers as HDF5, or its heat map to a `.png`.

    The file has groups `train`, `validation` and `test`, each with `rows`, all clients' row numbers one after
    the other, and `offsets` (N + 1): client k has rows[offsets[k] : offsets[k + 1]]; `unseen` are the clients
    that never train, `reserved` the rows that no client has.

    Returns:
        The heat map client × class as text.

    Raises:
        DataError: unusable data, `out` exists or cannot be written, or a picture without matplotlib.
        PartitionError: the partition cannot be met.
    """
    from pfedmoe_mpi.setup import deal, proposed  # a method may reserve rows, and methods need torch

    _refuse_existing(out)
    with open_dataset(config.data, config.seed, clients=config.clients) as data:
        config = proposed(config, data)
        partition = deal(config, data)
        data = data.fitted(partition)  # of next words this makes the classes
    if out.suffix.lower() == ".png":
        _draw(out, partition, data)
    else:
        _write(out, lambda file: _write_rows(file, partition, config))
    return heat_map(partition, data)


def _write_rows(file: Any, partition: Partition, config: Config) -> None:
    parts = {"train": partition.train, "validation": partition.validation, "test": partition.test}
    for name, clients in parts.items():
        file[f"{name}/rows"] = np.concatenate(clients)
        file[f"{name}/offsets"] = np.cumsum([0, *map(len, clients)])
    file["unseen"] = np.array(sorted(partition.unseen), np.int64)
    file["reserved"] = partition.reserved
    file.attrs["digest"] = partition.digest()
    file.attrs["seed"] = config.seed
    for name, value in config.partition.model_dump().items():
        file.attrs[name] = value


def heat_map(partition: Partition, data: Dataset) -> str:
    """Training samples by client (rows) and class (columns) as shades of the largest cell, 40 of each."""
    counts = partition.counts(data.labels, data.classes)
    shown = counts[:_SHOWN, :_SHOWN]
    shades = -(-shown * (len(_SHADES) - 1) // max(1, counts.max()))  # rounded up: one sample is visible
    lines = [f"client  train valid  test  classes 0 to {shown.shape[1] - 1} ({_SHADES[-1]} = {counts.max()})"]
    for client, shade in enumerate(shades):
        parts = (partition.train, partition.validation, partition.test)
        sizes = "".join(f"{len(part[client]):6d}" for part in parts)
        unseen = "  unseen" if client in partition.unseen else ""
        lines.append(f"{client:6d} {sizes}  |{''.join(_SHADES[level] * 2 for level in shade)}|{unseen}")
    for total, noun in zip(counts.shape, ("clients", "classes"), strict=True):
        if total > _SHOWN:
            lines.append(f"and {total - _SHOWN} more {noun}")
    if len(partition.reserved):
        lines.append(f"{len(partition.reserved)} rows are the server's")
    return "\n".join(lines)


def _draw(out: Path, partition: Partition, data: Dataset) -> None:
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise DataError(
            "drawing needs matplotlib", "pip install 'pfedmoe_mpi[report]', or write to .h5"
        ) from error
    counts = partition.counts(data.labels, data.classes)
    figure = Figure(figsize=(3 + 0.2 * min(data.classes, 60), 2 + 0.15 * min(partition.clients, 80)), dpi=150)
    axes = figure.add_subplot(xlabel="class", ylabel="client", title=f"{data.name}: training samples")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(axes.imshow(counts, aspect="auto", interpolation="nearest", cmap="viridis"))
    figure.tight_layout()
    with _new_file(out) as path:
        figure.savefig(path, format="png")


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise DataError(f"{out} exists and is not overwritten", "name another file, or move this one away")
    if not os.path.isdir(out.parent):
        raise DataError(f"there is no folder {out.parent}", "make it first")


def _write(out: Path, fill: Callable[[Any], None]) -> None:
    with _new_file(out) as path, h5py.File(path, "w", locking="best-effort") as file:
        fill(file)


@contextmanager
def _new_file(out: Path) -> Iterator[Path]:
    """A path to write; it becomes `out` when it is complete and on disk, and goes away if it is not."""
    path = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        yield path
        _sync(path)
        _refuse_existing(out)
        path.rename(out)
        _sync(out.parent)
    except (OSError, RuntimeError) as error:  # the HDF5 library raises either
        raise DataError(
            f"{out} cannot be written: {error}", "check the folder's space and permissions"
        ) from error
    finally:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
