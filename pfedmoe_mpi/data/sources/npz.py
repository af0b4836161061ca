"""npz: folders of PFLlib and HtFLlib, `train/K.npz` and `test/K.npz` with a pickled dict of x and y.

A file is read as one of MedMNIST.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pfedmoe_mpi.data.dataset import MemoryRows, SourceData, check_finite, sample_shape
from pfedmoe_mpi.data.sources.medmnist import load_medmnist
from pfedmoe_mpi.data.sources.npz_archive import read_archive
from pfedmoe_mpi.errors import DataError

_LAYOUT = "give train/0.npz, train/1.npz, ... and the same in test/, each with x and y"


def load_npz(root: Path) -> SourceData:
    """Read all clients into memory: client = K, official test part = the files in `test/`.

    Raises:
        DataError: a missing or malformed file, two files of one client, a pickle that holds more than arrays,
            clients of different shapes or dtypes, or NaN.
    """
    if root.is_file():
        return load_medmnist(root)
    parts: list[tuple[np.ndarray, np.ndarray, int, bool]] = []
    train, test = _files(root / "train"), _files(root / "test")
    if not train or set(train) != set(range(len(train))):
        missing = next(number for number in range(len(train) + 1) if number not in train)
        raise DataError(f"{root} has no train/{missing}.npz", _LAYOUT)
    if set(test) - set(train):
        raise DataError(f"{root} has test/{max(set(test) - set(train))}.npz without a train part", _LAYOUT)
    for number, files in ((number, (train, test)) for number in sorted(train)):
        parts += [(*_read_client(part[number]), number, part is test) for part in files if number in part]
    _check_equal_shapes(parts, root)
    sizes = [len(y) for _, y, _, _ in parts]
    return SourceData(
        name=root.resolve().name,
        where=f"npz folder {root}",
        store=MemoryRows(np.concatenate([x for x, _, _, _ in parts])),
        labels=np.concatenate([y for _, y, _, _ in parts]),
        client=np.repeat([number for _, _, number, _ in parts], sizes).astype(np.int64),
        official_test=np.repeat([official for _, _, _, official in parts], sizes) if test else None,
        proposals={"partition.kind": "natural", "clients": len(train)},
    )


def _files(folder: Path) -> dict[int, Path]:
    """Return the files `K.npz` by number K.

    Raises:
        DataError: two files have the same number: 1.npz and 01.npz.
    """
    files: dict[int, Path] = {}
    for path in sorted(folder.glob("*.npz")):
        if path.stem.isdecimal():
            other = files.setdefault(int(path.stem), path)
            if other != path:
                raise DataError(
                    f"{other} and {path} are both client {int(path.stem)}",
                    "remove one of them, or give it the number of another client",
                )
    return files


def _check_equal_shapes(parts: list[tuple[np.ndarray, np.ndarray, int, bool]], root: Path) -> None:
    first = parts[0][0]
    for x, _, number, _ in parts:
        if (x.shape[1:], x.dtype) != (first.shape[1:], first.dtype):
            raise DataError(
                f"{root}: x of client {number} is {x.dtype} {x.shape[1:]}, "
                f"of client 0 {first.dtype} {first.shape[1:]}",
                "give all clients samples of one shape and dtype",
            )


def _read_client(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return x (n, *shape) uint8 or float32 and y (n,) of one file."""
    arrays = read_archive(path)
    if "x" not in arrays or "y" not in arrays:
        raise DataError(f"{path} has no arrays x and y; it has {', '.join(arrays) or 'nothing'}", _LAYOUT)
    x, y = arrays["x"], arrays["y"]
    shape = sample_shape(x.shape, str(path))
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise DataError(f"x of {path} is {x.dtype}", "store uint8 (0 to 255) or float32")
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
        raise DataError(
            f"{path} has {len(x)} samples, but labels of {y.dtype} {y.shape}",
            f"give one integer label per sample, ({len(x)},)",
        )
    with np.errstate(over="ignore"):  # values too large for float32 become infinite, which is refused
        x = x.astype(np.uint8 if x.dtype == np.uint8 else np.float32, copy=False).reshape(-1, *shape)
    check_finite(x, np.arange(len(x)), str(path))
    return x, y.astype(np.int64)
