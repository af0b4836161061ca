"""One image file as uint8 pixels: upright, on white, and refused if 8 bits cannot hold it."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np

from pfedmoe_mpi.errors import DataError

TRANSPARENT = "transparent images are put on white"
TURNED = "images are turned upright as their EXIF orientation says"
CMYK = "CMYK images are converted to RGB without their colour profile"
_GREY = {"1", "L", "LA", "La"}
_WHITE = (255, 255)
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright


class ColourError(Exception):
    """A colour image after a grey first image."""


@dataclass(frozen=True, eq=False)
class Picture:
    """Pixels (1 or 3, H, W) uint8, and the conversion that a user should know of, or nothing."""

    pixels: np.ndarray
    conversion: str


@dataclass(frozen=True)
class Embedded:
    """An image file inside another file; `name` says where, in messages."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name


def decode(file: str | Embedded, size: int, colour: bool | None) -> Picture:
    """Return one image, resized to size × size pixels if `size` > 0; if `colour` is None, the file decides.

    Raises:
        ColourError: `colour` is False and the file has colours.
        DataError: not an image, more than 8 bits per channel, several frames, or white on a transparent
            background.
    """
    try:
        with _open(file) as image:
            _check_depth(image, file)
            _check_frames(image, file)
            grey = image.mode in _GREY
            if colour is False and not grey:
                raise ColourError
            upright, turned = _upright(image)
            opaque, conversion = _opaque(upright, file)
            pixels = _pixels(opaque, size, colour=not grey if colour is None else colour)
            return Picture(pixels, "; ".join(filter(None, (turned, conversion))))
    except (ColourError, DataError):
        raise
    except Exception as error:  # a damaged file may raise anything
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{file} cannot be read as an image: {reason}", "replace or remove the file"
        ) from error


def _open(file: str | Embedded) -> AbstractContextManager[Any]:
    """Open an image with Pillow, which does not read the pixels yet."""
    from PIL import Image

    if isinstance(file, Embedded):
        return Image.open(BytesIO(file.content))
    if not os.path.isfile(file):  # a pipe would wait for ever
        raise DataError(f"{file} is not a file, or links to none", "replace or remove it")
    return Image.open(file)


def _check_depth(image: Any, file: str | Embedded) -> None:
    """Refuse more than 8 bits per channel, which Pillow cuts to 8 unless the image is grey."""
    deep = image.mode[0] in "IF"
    for tile in image.tile:
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        deep = deep or any(isinstance(argument, str) and ";16" in argument for argument in arguments)
        greatest = arguments[1] if tile[0].startswith("ppm") and len(arguments) > 1 else 1
        deep = deep or greatest > 255
    if deep:
        raise DataError(
            f"{file} has more than 8 bits per channel",
            "store such images as float32 in an HDF5 file and set --data.source hdf5",
        )


def _check_frames(image: Any, file: str | Embedded) -> None:
    """Refuse an animation or a stack; a camera's MPO file is a JPEG image with previews behind it."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise DataError(
            f"{file} has {frames} frames, and one image is expected",
            f"keep the first one, `magick '{file}[0]' NEW.png`, or write each to a file of its own, "
            f"`magick {file} NEW-%d.png`",
        )


def _upright(image: Any) -> tuple[Any, str]:
    """Return the image as a viewer shows it, and the conversion that this is.

    A camera stores what its sensor saw, and notes in EXIF how it was held.
    """
    from PIL import ImageOps

    image.load()  # Pillow turns TIFF images here, and removes their orientation
    try:
        turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except Exception:  # damaged EXIF may raise anything, and the pixels do not need it
        return image, ""
    return (ImageOps.exif_transpose(image), TURNED) if turned else (image, "")


def _opaque(image: Any, file: str | Embedded) -> tuple[Any, str]:
    """Return the image, put on white if a pixel is transparent, and the conversion that this is."""
    from PIL import Image

    if image.mode == "CMYK":
        return image, CMYK
    if not image.has_transparency_data:
        return image, ""
    rgba = image.convert("RGBA")
    alpha = rgba.getextrema()[3]
    if alpha[0] == 255:
        return image, ""
    on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    if alpha[0] < alpha[1] and on_white.getextrema() == (_WHITE,) * 3:
        raise DataError(
            f"{file} is white on a transparent background, and transparent images are put on white",
            f"put it on another colour: magick {file} -background black -alpha remove {file}",
        )
    return on_white, TRANSPARENT


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
