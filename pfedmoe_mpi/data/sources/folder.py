"""Image folders: one folder per class, in `train/` and `test/` or directly in the root."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pfedmoe_mpi.data.dataset import IMAGENET_MEAN, IMAGENET_STD, MemoryRows, SourceData
from pfedmoe_mpi.environment import CORES
from pfedmoe_mpi.errors import DataError

_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_GREY = {"1", "L", "LA"}
_DEEP = {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}
_PER_TASK = 256  # files that a thread reads per task


class _ColourError(Exception):
    """A colour image after a grey first image."""


def load_folder(root: Path, size: int) -> SourceData:
    """Read the images of every class folder, in sorted order, into memory: (n, 1 or 3, H, W) uint8.

    The layout is torchvision's ImageFolder. If the root has `train/` and `test/`, the latter is the official
    test part. Images stay grey if all of them are grey. `size` > 0 resizes each to size × size pixels.

    Raises:
        DataError: no images, an empty class, an unreadable file, or images of different sizes without `size`.
    """
    files, labels, names, official = _list_images(root)
    x = _read(files, size)
    coloured = x.shape[1] == 3
    return SourceData(
        name=root.resolve().name,
        where=f"image folder {root}",
        store=MemoryRows(x),
        labels=labels,
        class_names=names,
        official_test=official,
        mean=IMAGENET_MEAN if coloured else (),
        std=IMAGENET_STD if coloured else (),
    )


def _list_images(root: Path) -> tuple[list[str], np.ndarray, tuple[str, ...], np.ndarray | None]:
    """Return (files, labels (n,), class names, mask (n,) of the official test part or None)."""
    parts = [root / name for name in ("train", "test") if (root / name).is_dir()]
    if not parts or not (root / "train").is_dir():
        parts = [root]
    names = _class_folders(parts[0])
    files: list[str] = []
    labels: list[int] = []
    starts: list[int] = []
    for part in parts:
        starts.append(len(files))
        if _class_folders(part) != names:
            differing = sorted(set(names) ^ set(_class_folders(part)))
            raise DataError(
                f"{parts[0]} and {part} differ in class {differing[0]}", "give both the same class folders"
            )
        for label, name in enumerate(names):
            images = sorted(_images(part / name))
            if not images:
                raise DataError(
                    f"{part / name} holds no image", f"remove it, or add images ({', '.join(_ENDINGS)})"
                )
            files += images
            labels += [label] * len(images)
    official = np.arange(len(files)) >= starts[1] if len(parts) == 2 else None
    return files, np.array(labels, np.int64), names, official


def _class_folders(part: Path) -> tuple[str, ...]:
    """Return the names of the class folders, sorted."""
    try:
        names = sorted(entry.name for entry in os.scandir(part) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise DataError(
            f"{part} cannot be listed: {error.strerror}",
            "set --data.path to a folder with one folder of images per class",
        ) from error
    if not names:
        raise DataError(
            f"{part} has no class folders",
            "set --data.path to a folder with one folder of images per class",
        )
    return tuple(names)


def _images(folder: Path) -> Iterator[str]:
    """Yield the paths of all images below a folder."""
    for parent, _, names in os.walk(folder, followlinks=True):
        yield from (os.path.join(parent, name) for name in names if _is_image(name))


def _is_image(name: str) -> bool:
    return name[0] != "." and name.lower().endswith(_ENDINGS)


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
