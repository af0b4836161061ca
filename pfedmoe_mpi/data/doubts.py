"""What suggests a mistake in the data: equal rows, an unusual range of values, copies of test rows."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from pfedmoe_mpi.data.dataset import Dataset, SourceData
from pfedmoe_mpi.errors import DataError

_SEARCHED = 256 << 20  # bytes of samples in a file that are searched for copies
_READ = 16 << 20  # bytes that are read at once


def doubts(source: SourceData, data: Dataset, sample: np.ndarray) -> Iterator[str]:
    """Yield a warning for each doubt about the samples.

    Images are searched for copies of each other. Features and texts may be equal by chance, so that only test
    rows that equal a training row count. Windows of a text (`ordered`) are not searched.

    Args:
        sample: some rows of the data, from all over (m, ...).
    """
    if len(sample) > 1 and (sample == sample[:1]).all():
        yield f"{source.where}: all {len(sample):,} rows that were compared are equal; write the data again"
        return
    yield from _range(source, data, sample)
    images = len(source.store.shape) == 3
    if not data.ordered and (images or data.official_test is not None):
        yield from _copies(source, images=images)


def _range(source: SourceData, data: Dataset, x: np.ndarray) -> Iterator[str]:
    """Yield a warning if values are outside of what their type suggests."""
    if x.dtype == np.uint8 and x.max() <= 1:
        yield (
            f"{source.where}: bytes are only 0 and 1, which are divided by 255; store 0 and 255, or float32"
        )
    if x.dtype == np.float32 and x.ndim == 4 and not data.mean and x.min() >= 0 and 2 < x.max() <= 255:
        yield (
            f"{source.where}: images are floats up to {x.max():g}, which are not divided by 255; "
            "store uint8, or set --data.mean and --data.std"
        )


def _copies(source: SourceData, *, images: bool) -> Iterator[str]:
    """Yield a warning if rows are equal, with the number of copies and two of the rows."""
    store, labels, test = source.store, source.labels, source.official_test
    row_bytes = max(1, store.dtype.itemsize * int(np.prod(store.shape)))
    if store.distributed and row_bytes * len(labels) > _SEARCHED:
        return
    first: dict[bytes, int] = {}
    originals = np.empty(len(labels), np.int64)
    step = max(1, _READ // row_bytes)
    for start in range(0, len(labels), step):
        try:
            samples = store.read(np.arange(start, min(start + step, len(labels))))
        except DataError:  # a damaged chunk stops only a run that needs its rows
            return
        for row, sample in enumerate(samples, start):
            originals[row] = first.setdefault(blake2b(sample, digest_size=16).digest(), row)
    copies = np.flatnonzero(originals != np.arange(len(labels)))
    leaked = copies[test[copies] != test[originals[copies]]] if test is not None else copies[:0]
    if not images:
        copies = leaked
    if not len(copies):
        return
    elsewhere = copies[labels[copies] != labels[originals[copies]]]
    shown = min(leaked if len(leaked) else elsewhere if len(elsewhere) else copies)
    kind = "images with the pixels" if images else "rows with the values"
    text = f"{kind} of an earlier one: {len(copies)} of {len(labels)}"
    text += f", {len(leaked)} across training and test part" if len(leaked) else ""
    text += f", {len(elsewhere)} across classes" if len(elsewhere) else ""
    names = source.files or [f"row {row}" for row in range(len(labels))]
    yield f"{text}; for example {names[originals[shown]]} and {names[shown]}; remove copies"
