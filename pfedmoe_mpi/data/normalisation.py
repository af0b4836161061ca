"""The check of a data set's mean and std, the same for flags, files and the sources' own constants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pfedmoe_mpi.errors import DataError

_ROUNDING = 2.0**-30  # of a mean; float32 samples around it differ by more, or not at all


def check_constants(
    mean: Sequence[float], std: Sequence[float], shape: tuple[int, ...], dtype: np.dtype, names: str
) -> None:
    """Check `mean` and `std` of samples of `shape`: one number each per channel (per feature), or none.

    Samples are normalised in float32, so the numbers must be usable there.

    Args:
        names: what the numbers are called in messages: "mean and std of FILE".

    Raises:
        DataError: one of them is missing, there are too many or too few numbers, a std is not positive, a
            number is not finite, or a mean of uint8 samples is not in [0, 1].
    """
    if not len(mean) and not len(std):
        return
    part, channels = ("channel" if len(shape) == 3 else "feature"), shape[0]
    if not len(mean) == len(std) == channels:
        count = str(len(mean)) if len(mean) == len(std) else f"{len(mean)} and {len(std)}"
        raise DataError(
            f"{names} have {count} numbers, but a sample has {channels} {part}s (shape {shape})",
            f"give {channels} numbers each, one per {part}",
        )
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        centre, scale = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        usable = (scale > _ROUNDING * abs(centre)) & np.isfinite(scale) & np.isfinite(1 / scale)
    if not np.isfinite(centre).all():
        number = int(np.argmin(np.isfinite(centre)))
        raise DataError(
            f"{names}: the mean of {part} {number} is {mean[number]:g}; it must be finite",
            f"compute it without missing values, or remove the {part}",
        )
    if not usable.all():
        number = int(np.argmin(usable))
        raise DataError(
            f"{names}: the std of {part} {number} is {std[number]:g}; it must be positive, finite and more "
            f"than the rounding of its mean, {mean[number]:g}",
            f"set the std of a {part} that never varies to 1",
        )
    if dtype == np.uint8 and not ((centre >= 0) & (centre <= 1)).all():
        number = int(np.argmax((centre < 0) | (centre > 1)))
        raise DataError(
            f"{names}: the mean of {part} {number} is {mean[number]:g}, but uint8 samples are divided by 255 "
            "first, so that it is from 0 to 1",
            "divide mean and std by 255",
        )
