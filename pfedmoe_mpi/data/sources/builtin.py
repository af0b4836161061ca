"""The sources that need no file of the user: digits and synthetic."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.core.seeds import numpy_generator
from pfedmoe_mpi.data.dataset import MemoryRows, SourceData
from pfedmoe_mpi.errors import DataError

_DIGITS = Path(__file__).parents[2] / "assets" / "digits.h5"


def load_digits(settings: Data) -> SourceData:
    """Return 1,797 handwritten digits, 1 × 32 × 32 uint8, or `data.size` pixels a side.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (CC BY 4.0), the
    part that scikit-learn contains: 8 × 8 pixels of 0..16. Here pixels are repeated and scaled to 0..255.
    """
    with h5py.File(_DIGITS, "r", locking="best-effort") as file:
        x, labels = file["x"][()], file["y"][()]
    size = settings.size or 32
    nearest = np.arange(size) * x.shape[1] // size
    grey = (x.astype(np.uint16) * 255 + 8) // 16
    images = grey.astype(np.uint8)[:, None, nearest[:, None], nearest]
    return SourceData("digits", "data.source = digits", MemoryRows(images), labels)


def draw_synthetic(settings: Data, seed: int, clients: int) -> SourceData:
    """Draw Gaussian images: a coarse pattern per class plus noise, 3 × size × size uint8, balanced classes.

    Row i belongs to natural client i mod `clients`.

    Raises:
        DataError: fewer samples than classes or clients.
    """
    n, classes, size = settings.samples, settings.classes, settings.size or 32
    if n < max(classes, clients):
        raise DataError(
            f"data.samples = {n} is below the number of {'classes' if n < classes else 'clients'}",
            f"set --data.samples {max(classes, clients)} or more",
        )
    generator = numpy_generator(seed, "synthetic")
    coarse = generator.standard_normal((classes, 3, 4, 4), dtype=np.float32)
    nearest = np.arange(size) * 4 // size
    pattern = 128 + 32 * coarse[:, :, nearest[:, None], nearest]
    labels = generator.permutation(np.arange(n) % classes)
    x = np.empty((n, 3, size, size), np.uint8)
    for start in range(0, n, 1024):
        block = pattern[labels[start : start + 1024]]
        drawn = generator.standard_normal(block.shape, dtype=np.float32)
        drawn *= 48
        drawn += block
        x[start : start + 1024] = np.rint(drawn, out=drawn).clip(0, 255, out=drawn)
    return SourceData(
        "synthetic",
        "data.source = synthetic",
        MemoryRows(x),
        labels,
        client=np.arange(n) % clients,
    )
