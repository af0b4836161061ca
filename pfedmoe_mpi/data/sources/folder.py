"""Image folders: one folder per class, in official parts or directly in the root."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pfedmoe_mpi.data.dataset import IMAGENET_MEAN, IMAGENET_STD, MemoryRows, SourceData
from pfedmoe_mpi.data.sources.image_layout import read_layout
from pfedmoe_mpi.environment import CORES
from pfedmoe_mpi.errors import DataError

_GREY = {"1", "L", "LA"}
_DEEP = {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}
_PER_TASK = 256  # files that a thread reads per task


class _ColourError(Exception):
    """A colour image after a grey first image."""


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
    x = _read(layout.files, size)
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
        warnings=layout.warnings,
    )


def _read(files: Sequence[str], size: int) -> np.ndarray:
    """Return all images as (n, 1, H, W) if they are all grey, else (n, 3, H, W)."""
    first = _decode(files[0], size, colour=None)
    try:
        return _read_all(files, size, first)
    except _ColourError:
        return _read_all(files, size, np.broadcast_to(first, (3, *first.shape[1:])))


def _read_all(files: Sequence[str], size: int, first: np.ndarray) -> np.ndarray:
    """Return all images with as many channels as `first`.

    Threads read them, because decoding releases the interpreter lock.
    """
    x = np.empty((len(files), *first.shape), np.uint8)

    def fill(start: int) -> None:
        for row in range(start, min(start + _PER_TASK, len(files))):
            image = _decode(files[row], size, colour=len(first) == 3)
            if image.shape != first.shape:
                raise DataError(
                    f"{files[row]} has {image.shape[1]} × {image.shape[2]} pixels, "
                    f"{files[0]} {first.shape[1]} × {first.shape[2]}",
                    "resize all images with --data.size, for example --data.size 32",
                )
            x[row] = image

    with ThreadPoolExecutor(CORES) as pool:
        tasks = [pool.submit(fill, start) for start in range(0, len(files), _PER_TASK)]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return x


def _decode(file: str, size: int, colour: bool | None) -> np.ndarray:
    """Return one image as (1 or 3, H, W); if `colour` is None, the file decides.

    Raises:
        _ColourError: `colour` is False and the file has colours.
        DataError: not an image, or more than 8 bits per channel.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode in _DEEP:
                raise DataError(
                    f"{file} has more than 8 bits per channel",
                    "store such images as float32 in an HDF5 file and set --data.source hdf5",
                )
            grey = image.mode in _GREY
            if colour is False and not grey:
                raise _ColourError
            return _pixels(image, size, colour=not grey if colour is None else colour)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{file} cannot be read as an image: {error}", "replace or remove the file"
        ) from error


def _pixels(image: Any, size: int, colour: bool) -> np.ndarray:
    """Return a PIL image as (1 or 3, H, W) uint8."""
    from PIL import Image

    mode = "RGB" if colour else "L"
    if image.mode != mode:
        image = image.convert(mode)
    if size and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels.transpose(2, 0, 1) if colour else pixels[None]
