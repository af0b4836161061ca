"""Data files, generated or real, and the messages about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data import Dataset
from pfedmoe_mpi.data.sources.open import open_dataset
from pfedmoe_mpi.errors import DataError
from support.paths import ROOT

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def shared_data(name: str) -> Path:
    """Return a real data set's path beside the repository; skip the test where it is missing."""
    path = ROOT.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"shared/data/{name} is not beside the repository")
    return path


def open_data(
    source: str, path: Path | str = "", *, seed: int = 0, clients: int = 4, **settings: Any
) -> Dataset:
    return open_dataset(Data(source=source, path=str(path), **settings), seed, clients=clients)


def all_rows(data: Dataset) -> np.ndarray:
    return data.rows(np.arange(len(data)))


def data_error(pattern: str, source: str, path: Path | str = "", **settings: Any) -> str:
    """Return the DataError's message about these data; it must match `pattern` and state a remedy."""
    with pytest.raises(DataError, match=pattern) as caught:
        open_data(source, path, **settings)
    assert "remedy: " in str(caught.value)
    return str(caught.value)


def write_h5(path: Path, **tables: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, table in tables.items():
            file[name] = table
    return path


def random_images(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def file_names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write_damaged_h5(path: Path, x: np.ndarray, block: int, damaged: int) -> Path:
    """Write `x` in checksummed chunks of `block` rows, and damage the chunk of row `damaged`."""
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=x, chunks=(block, *x.shape[1:]), fletcher32=True)
        file["y"] = np.arange(len(x)) % 2
        place = file["x"].id.get_chunk_info_by_coord((damaged // block * block, 0, 0, 0)).byte_offset
    with path.open("r+b") as raw:
        raw.seek(place)
        raw.write(bytes(64))
    return path


def write_image_folder(root: Path, counts: dict[str, int], shape: tuple[int, ...] = (8, 10, 3)) -> Path:
    for seed, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number, pixels in enumerate(random_images(count, *shape, seed=seed)):
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def write_npz_clients(root: Path, part: str, clients: dict[Any, Any]) -> Path:
    (root / part).mkdir(parents=True, exist_ok=True)
    for client, content in clients.items():
        np.savez_compressed(root / part / f"{client}.npz", data=content)
    return root


def client_arrays(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).standard_normal((n, 1, 4, 4)).astype(np.float32)
    return {"x": x, "y": np.arange(n) % 3}


GOOD_X = random_images(6, 1, 4, 4)
GOOD_Y = np.array([0, 1, 2, 0, 1, 2])
NAN = np.where(np.arange(6 * 16).reshape(6, 1, 4, 4) == 70, np.nan, 1.0)
