"""Image folders: one folder per class, in official parts or directly in the root."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pfedmoe_mpi.data.dataset import IMAGENET_MEAN, IMAGENET_STD, MemoryRows, SourceData
from pfedmoe_mpi.data.sources.image_file import ColourError, Embedded, decode
from pfedmoe_mpi.data.sources.image_layout import read_layout
from pfedmoe_mpi.environment import CORES
from pfedmoe_mpi.errors import DataError

_PER_TASK = 256  # files that a thread reads per task


def load_folder(root: Path, size: int) -> SourceData:
    """Read the images of every class folder, in sorted order, into memory: (n, 1 or 3, H, W) uint8.

    The layout is torchvision's ImageFolder. If the root has `train/` and `test/` (or `training`, `Test`,
    `test_set` and the like), the latter is the official test part; a validation part is not read. Images stay
    grey if all of them are grey. `size` > 0 resizes each to size × size pixels.

    Raises:
        DataError: no images, an empty class, an unclear layout, an unreadable file, or images of different
            sizes without `size`.
    """
    layout = read_layout(root)
    x, conversions = read_images(layout.files, size)
    coloured = x.shape[1] == 3
    return SourceData(
        name=root.resolve().name,
        where=f"image folder {root}",
        store=MemoryRows(x),
        labels=layout.labels,
        class_names=layout.class_names,
        official_test=layout.official_test,
        mean=IMAGENET_MEAN if coloured else (),
        std=IMAGENET_STD if coloured else (),
        files=layout.files,
        warnings=(*layout.warnings, *describe_conversions(layout.files, conversions)),
    )


def read_images(files: Sequence[str | Embedded], size: int) -> tuple[np.ndarray, list[str]]:
    """Return all images, (n, 1, H, W) if they are all grey, else (n, 3, H, W), and how each is converted."""
    first = decode(files[0], size, colour=None).pixels
    try:
        return _read_all(files, size, first)
    except ColourError:
        return _read_all(files, size, np.broadcast_to(first, (3, *first.shape[1:])))


def _read_all(files: Sequence[str | Embedded], size: int, first: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return all images with as many channels as `first`, and how each is converted.

    Threads read them, because decoding releases the interpreter lock.
    """
    x = np.empty((len(files), *first.shape), np.uint8)
    conversions = [""] * len(files)

    def fill(start: int) -> None:
        for row in range(start, min(start + _PER_TASK, len(files))):
            picture = decode(files[row], size, colour=len(first) == 3)
            height, width = picture.pixels.shape[1:]
            if (height, width) != first.shape[1:]:
                raise DataError(
                    f"{files[row]} has {height} × {width} pixels, "
                    f"{files[0]} {first.shape[1]} × {first.shape[2]}",
                    "resize all images with --data.size, for example --data.size 32",
                )
            x[row], conversions[row] = picture.pixels, picture.conversion

    with ThreadPoolExecutor(CORES) as pool:
        tasks = [pool.submit(fill, start) for start in range(0, len(files), _PER_TASK)]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return x, conversions


def describe_conversions(files: Sequence[str | Embedded], conversions: Sequence[str]) -> list[str]:
    """Return a warning per kind of conversion, with the number of files and the first one."""
    return [
        f"{kind}: {number} of {len(files)}, for example {files[conversions.index(kind)]}"
        for kind, number in Counter(conversions).items()
        if kind
    ]
