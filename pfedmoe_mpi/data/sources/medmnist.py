"""MedMNIST: one npz file with `train_images`, `train_labels`, and the same of `val` and `test`.

Source: J. Yang et al., MedMNIST v2, Scientific Data 10, 41 (2023). Images are (n, size, size) or (n, size,
size, 3) uint8 of 28 to 224 pixels a side, labels (n, 1).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pfedmoe_mpi.data.dataset import IMAGENET_MEAN, IMAGENET_STD, MemoryRows, SourceData
from pfedmoe_mpi.data.sources.npz_archive import read_archive
from pfedmoe_mpi.data.sources.numbering import renumber
from pfedmoe_mpi.data.sources.official_parts import unread_validation
from pfedmoe_mpi.errors import DataError

_LAYOUT = (
    "give train_images, train_labels, test_images and test_labels, as MedMNIST; for clients of PFLlib set "
    "--data.path to the folder of train/0.npz"
)


def load_medmnist(path: Path) -> SourceData:
    """Read the training and the official test part into memory, (n, 1 or 3, size, size) uint8.

    The validation part is left out, so that training rows are those of the literature.

    Raises:
        DataError: a damaged file or one of another layout, labels of several classes per image, or volumes.
    """
    arrays = read_archive(path, ("train_", "test_", "val_labels"))
    if "train_images" not in arrays:
        raise DataError(f"{path} has no array train_images", _LAYOUT)
    parts = [_part(path, arrays, name) for name in ("train", "test") if f"{name}_images" in arrays]
    shapes = {x.shape[1:] for x, _ in parts}
    if len(shapes) > 1:
        raise DataError(
            f"{path} has images of shapes {sorted(shapes)}", "give both parts images of one shape"
        )
    given = np.concatenate([y for _, y in parts])
    classes, names = renumber(np.unique(given).tolist())
    coloured = parts[0][0].shape[1] == 3
    unread = [f"{len(y):,} validation samples" for name, y in arrays.items() if name == "val_labels"]
    return SourceData(
        name=path.stem,
        where=str(path),
        store=MemoryRows(np.concatenate([x for x, _ in parts])),
        labels=np.array([classes[label] for label in given.tolist()], np.int64),
        class_names=names,
        official_test=np.repeat([False, True], [len(y) for _, y in parts]) if len(parts) == 2 else None,
        mean=IMAGENET_MEAN if coloured else (),
        std=IMAGENET_STD if coloured else (),
        left_out=tuple(unread_validation(what, tested=len(parts) == 2) for what in unread),
    )


def _part(path: Path, arrays: dict[str, np.ndarray], part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (n, C, H, W) and labels (n,) of one part."""
    x, y = arrays[f"{part}_images"], arrays.get(f"{part}_labels")
    if y is None:
        raise DataError(f"{path} has {part}_images, and no {part}_labels", _LAYOUT)
    where = f"{part}_images of {path}"
    if x.ndim == 4 and x.shape[3] != 3:
        problem = f"{where} are volumes {x.shape}, and images have one or three channels"
        raise DataError(problem, "choose a data set of MedMNIST2D, or write slices as (n, height, width)")
    if x.ndim not in {3, 4} or x.dtype != np.uint8 or not x.size:
        raise DataError(f"{where} are {x.dtype} {x.shape}, not images", _LAYOUT)
    if y.ndim == 2 and len(y) == len(x) and y.shape[1] > 1:
        raise DataError(
            f"{part}_labels of {path} give an image up to {y.shape[1]} classes, and a sample here has one",
            "choose a data set with one label, or keep one column of the labels: labels[:, :1]",
        )
    if y.shape not in {(len(x),), (len(x), 1)} or y.dtype.kind not in "iu":
        problem = f"{path} has {len(x)} {part}_images, but labels of {y.dtype} {y.shape}"
        raise DataError(problem, f"give one integer label per image, ({len(x)}, 1)")
    return x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2), y.reshape(-1).astype(np.int64)
