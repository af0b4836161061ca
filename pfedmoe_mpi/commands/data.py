"""`data prepare` and `data partition`: any source as one HDF5 file, a partition as HDF5 file or picture."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import Any

from pfedmoe_mpi.config import Config
from pfedmoe_mpi.data.dataset import Dataset
from pfedmoe_mpi.data.partition import Partition
from pfedmoe_mpi.data.partition_file import write_rows
from pfedmoe_mpi.data.sources.hdf5 import write_hdf5
from pfedmoe_mpi.data.sources.open import open_dataset, print_summary, print_warnings
from pfedmoe_mpi.data.summary import plain
from pfedmoe_mpi.errors import DataError
from pfedmoe_mpi.storage import durable

_SHOWN = 40  # clients and classes in a heat map as text
_SHADES = " ░▒▓█"
_LONGEST = 14  # characters of a name in a picture


def prepare(config: Config, out: Path) -> str:
    """Write the data of `config.data` as one HDF5 file, from which a rank reads only the rows it needs.

    This is the only place where torchvision may download. `data.source = hdf5` reads the file back as the
    same data set.

    Returns:
        One line that describes the file.

    Raises:
        DataError: the data are unusable, or `out` exists or cannot be written; no partial file remains.
    """
    _refuse_existing(out)
    with open_dataset(config.data, config.seed, clients=config.clients, download=True) as data:
        print_summary(data)
        print_warnings(data)
        if data.fit:
            raise DataError(
                f"{data.name} depends on the training rows of each client and cannot be prepared before the "
                "partition",
                f"run with --data.source {config.data.source}; the first rank reads the data and sends rows",
            )
        with _new_file(out) as path:
            write_hdf5(path, data)
        return (
            f"{out}: {len(data)} samples of {' × '.join(map(str, data.shape))} {data.dtype}, "
            f"{data.classes} classes, {out.stat().st_size / 2**20:.1f} MiB"
        )


def write_partition(config: Config, out: Path) -> str:
    """Compute the partition of `config`, and write its row numbers as HDF5 or its heat map as `.png`.

    `partition_file.write_rows` describes the HDF5 file.

    Returns:
        The heat map client × class as text.

    Raises:
        DataError: the data are unusable, `out` exists or cannot be written, or matplotlib is missing for a
            picture.
        PartitionError: the settings cannot be satisfied.
    """
    # Imported late because these need torch: a method decides whether rows are reserved.
    from pfedmoe_mpi.federation.effective import apply_proposals, with_listed
    from pfedmoe_mpi.federation.plan import draw_partition

    _refuse_existing(out)
    config = with_listed(config)
    with open_dataset(config.data, config.seed, clients=config.clients) as data:
        print_summary(data)
        print_warnings(data)
        config = apply_proposals(config, data)
        partition = draw_partition(config, data)
        labels, data = data.labels, data.fitted(partition)  # for next words this determines the classes
    if out.suffix.lower() == ".png":
        _draw(out, partition, data)
    else:
        with _new_file(out) as path:
            write_rows(path, partition, labels, config)
    return heat_map(partition, data)


def heat_map(partition: Partition, data: Dataset) -> str:
    """Return the training samples by client (lines) and class (columns) as text, 40 of each at most.

    Shades are relative to the largest cell. Names are shown where clients or classes have them.
    """
    counts = partition.counts(data.labels, data.classes)
    shown = counts[:_SHOWN, :_SHOWN]
    shades = -(-shown * (len(_SHADES) - 1) // max(1, counts.max()))  # rounded up, so one sample is visible
    names = [f"  {name}" for name in plain(partition.client_names, _SHOWN)] or [""] * len(shown)
    lines = [f"client  train valid  test  classes 0 to {shown.shape[1] - 1} ({_SHADES[-1]} = {counts.max()})"]
    for client, shade in enumerate(shades):
        parts = (partition.train, partition.validation, partition.test)
        sizes = "".join(f"{len(part[client]):6d}" for part in parts)
        unseen = "  unseen" if client in partition.unseen else ""
        cells = "".join(_SHADES[level] * 2 for level in shade)
        lines.append(f"{client:6d} {sizes}  |{cells}|{names[client]}{unseen}")
    for total, noun in zip(counts.shape, ("clients", "classes"), strict=True):
        if total > _SHOWN:
            lines.append(f"and {total - _SHOWN} more {noun}")
    if data.class_names != tuple(map(str, range(data.classes))):
        listed = enumerate(plain(data.class_names, _SHOWN))
        lines += wrap("classes: " + ", ".join(f"{number} {name}" for number, name in listed), 100)
    if len(partition.reserved):
        lines.append(f"{len(partition.reserved)} rows are reserved for the server")
    return "\n".join(lines)


def _draw(out: Path, partition: Partition, data: Dataset) -> None:
    """Write the heat map client × class as a picture."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise DataError(
            f"writing the picture {out} needs matplotlib",
            "pip install 'pfedmoe_mpi[report]', or name an output file that ends in .h5",
        ) from error
    with rc_context({"text.parse_math": False}):  # names between dollars are no formulas
        figure = Figure(dpi=150)
        _fill(figure, partition, data)
        with _new_file(out) as path:
            figure.savefig(path, format="png")


def _fill(figure: Any, partition: Partition, data: Dataset) -> None:
    """Draw the heat map into a figure of matplotlib."""
    from matplotlib.ticker import MaxNLocator

    counts = partition.counts(data.labels, data.classes)
    figure.set_size_inches(3.5 + 0.2 * min(data.classes, 60), 3 + 0.15 * min(partition.clients, 80))
    axes = figure.add_subplot(xlabel="class", ylabel="client", title=f"{data.name}: training samples")
    classes = () if data.class_names == tuple(map(str, range(data.classes))) else data.class_names
    for axis, names in ((axes.xaxis, classes), (axes.yaxis, partition.client_names)):
        axis.set_major_locator(MaxNLocator(integer=True))
        if names and len(names) <= _SHOWN:
            turned = 90 if axis is axes.xaxis else 0
            shown = [
                name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…" for name in plain(names, _SHOWN)
            ]
            axis.set_ticks(range(len(names)), shown, fontsize=7, rotation=turned)
    figure.colorbar(axes.imshow(counts, aspect="auto", interpolation="nearest", cmap="viridis"))
    figure.tight_layout()


def _refuse_existing(out: Path) -> None:
    """Raise a DataError if `out` exists or its folder does not."""
    if os.path.lexists(out):
        raise DataError(f"{out} exists and is not overwritten", "name another file, or move this one away")
    if not os.path.isdir(out.parent):
        raise DataError(f"there is no folder {out.parent}", f"make it first: mkdir -p {out.parent}")


@contextmanager
def _new_file(out: Path) -> Iterator[Path]:
    """Yield a path to write, which becomes `out` once it is complete.

    Raises:
        DataError: `out` exists by then, or cannot be written.
    """
    try:
        with durable.new_file(out) as path:
            yield path
    except (OSError, RuntimeError) as error:  # the HDF5 library raises either
        raise DataError(
            f"{out} cannot be written: {error}", "check the folder's space and permissions"
        ) from error
