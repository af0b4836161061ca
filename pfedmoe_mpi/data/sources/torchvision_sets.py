"""torchvision's data sets, from a local root; ranks never download, only `data prepare` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.dataset import IMAGENET_MEAN, IMAGENET_STD, MemoryRows, SourceData
from pfedmoe_mpi.errors import DataError, nearest

NAMES = ("MNIST", "FashionMNIST", "EMNIST", "SVHN", "CIFAR10", "CIFAR100")


def load_torchvision(settings: Data, download: bool) -> SourceData:
    """Read the training and test part of `data.name` in `data.path` into memory, (n, C, H, W) uint8.

    EMNIST is its `balanced` split of 47 classes, with images turned upright. CIFAR gets ImageNet's mean and
    std, as in the authors' released code.

    Raises:
        DataError: an unknown name, missing data (if not `download`), or a failed download.
    """
    name = _full_name(settings.name)
    root = Path(settings.path).expanduser()
    train, test = (_part(name, root, part == "train", download) for part in ("train", "test"))
    pixels = [_pixels(part, name) for part in (train, test)]
    labels = [np.asarray(part.labels if name == "SVHN" else part.targets) for part in (train, test)]
    cifar = name.startswith("CIFAR")
    return SourceData(
        name=name,
        where=f"torchvision's {name} in {root}",
        store=MemoryRows(np.concatenate(pixels)),
        labels=np.concatenate(labels),
        class_names=tuple(map(str, getattr(train, "classes", ()))),
        official_test=np.repeat([False, True], [len(pixels[0]), len(pixels[1])]),
        mean=IMAGENET_MEAN if cifar else (),
        std=IMAGENET_STD if cifar else (),
    )


def _full_name(name: str) -> str:
    """Return a data set's name as torchvision spells it, in whatever case it was given."""
    for full_name in NAMES:
        if full_name.lower() == name.lower():
            return full_name
    raise DataError(
        f"data.name = '{name}' is unknown{nearest(name, NAMES)}",
        f"set --data.name to one of {', '.join(NAMES)}",
    )


def _part(name: str, root: Path, train: bool, download: bool) -> Any:
    """Return torchvision's data set of the training or test part."""
    from torchvision import datasets

    old = root / name / "processed"
    if old.is_dir():  # torchvision would still unpickle it
        raise DataError(
            f"{old} holds files of an old torchvision", f"remove this folder; {root / name / 'raw'} is enough"
        )
    split: dict[str, Any] = {"split": "train" if train else "test"} if name == "SVHN" else {"train": train}
    if name == "EMNIST":
        split["split"] = "balanced"
    try:
        return getattr(datasets, name)(str(root), download=download, **split)
    except ModuleNotFoundError as error:
        raise DataError(
            f"reading {name} needs {error.name}", f"install it: pip install {error.name}"
        ) from error
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        if download:
            raise DataError(
                f"{name} could not be downloaded to {root}: {error}", "check the network and the disk"
            ) from error
        raise DataError(
            f"{name} is not downloaded, or damaged, in {root}",
            "on a node with Internet access, run `python -m pfedmoe_mpi data prepare OUT.h5 "
            f"--data.source torchvision --data.name {name} --data.path {root}` once",
        ) from error


def _pixels(part: Any, name: str) -> np.ndarray:
    """Return the images of a part as (n, C, H, W) uint8."""
    pixels = np.asarray(part.data)
    if name == "SVHN":
        return pixels
    if name.startswith("CIFAR"):
        return pixels.transpose(0, 3, 1, 2)
    return (pixels.transpose(0, 2, 1) if name == "EMNIST" else pixels)[:, None]
