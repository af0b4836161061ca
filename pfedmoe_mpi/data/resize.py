"""Bilinear resizing of images, with antialiasing.

The sum runs over the taps one by one, not through a matrix product. The value of a pixel then depends neither
on how many images are read together nor on a library's number of threads.
"""

from __future__ import annotations

import numpy as np

_BLOCK = 1024  # images resized at once: bounds the memory of the float32 copies


def resize(x: np.ndarray, size: int) -> np.ndarray:
    """Return images (m, C, H, W) as (m, C, size, size) of the same dtype; uint8 is rounded."""
    out = np.empty((*x.shape[:2], size, size), x.dtype)
    for start in range(0, len(x), _BLOCK):
        block = x[start : start + _BLOCK].astype(np.float32)
        rows_resized = _resize_rows(block, size)
        resized = _resize_rows(rows_resized.swapaxes(2, 3), size).swapaxes(2, 3)
        out[start : start + _BLOCK] = np.rint(resized).clip(0, 255) if x.dtype == np.uint8 else resized
    return out


def _resize_rows(x: np.ndarray, size: int) -> np.ndarray:
    """Return images (m, C, H, W) as (m, C, size, W)."""
    index, weight = _taps(x.shape[2], size)
    out = np.zeros((*x.shape[:2], size, x.shape[3]), np.float32)
    for tap in range(index.shape[1]):
        out += weight[:, tap, None] * x[:, :, index[:, tap]]
    return out


def _taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the source rows (size, taps) of every target row, and their triangle weights.

    When an image shrinks, the triangle is wider by the scale.
    """
    scale = length / size
    reach = max(scale, 1.0)
    centre = (np.arange(size) + 0.5) * scale - 0.5
    index = np.ceil(centre - reach).astype(np.int64)[:, None] + np.arange(int(2 * reach) + 1)
    weight = np.maximum(0, 1 - np.abs(index - centre[:, None]) / reach)
    weight[(index < 0) | (index >= length)] = 0
    weight /= weight.sum(axis=1, keepdims=True)
    return index.clip(0, length - 1), weight.astype(np.float32)
