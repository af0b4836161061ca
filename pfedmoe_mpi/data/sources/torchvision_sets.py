"""torchvision's data sets, from a local root: ranks never download, `data prepare` may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.dataset import IMAGENET_MEAN, IMAGENET_STD, HeldRows, Loaded
from pfedmoe_mpi.errors import DataError, nearest

NAMES = ("MNIST", "FashionMNIST", "EMNIST", "SVHN", "CIFAR10", "CIFAR100")


def load_torchvision(settings: Data, download: bool) -> Loaded:
    """Training and test part of `data.name` below `data.path`, in memory, (n, C, H, W) uint8.

    EMNIST is its `balanced` split of 47 classes, its images turned upright. CIFAR gets ImageNet's mean and
    std, as in the code released beside the paper.

    Raises:
        DataError: an unknown name, data that are not there (`download` False), or a download that failed.
    """
    name = _known(settings.name)
    root = Path(settings.path).expanduser()
    train, test = (_part(name, root, part == "train", download) for part in ("train", "test"))
    pixels = [_pixels(part, name) for part in (train, test)]
    labels = [np.asarray(part.labels if name == "SVHN" else part.targets) for part in (train, test)]
    cifar = name.startswith("CIFAR")
    return Loaded(
        name=name,
        where=f"torchvision's {name} in {root}",
        store=HeldRows(np.concatenate(pixels)),
        labels=np.concatenate(labels),
        class_names=tuple(map(str, getattr(train, "classes", ()))),
        official_test=np.repeat([False, True], [len(pixels[0]), len(pixels[1])]),
        mean=IMAGENET_MEAN if cifar else (),
        std=IMAGENET_STD if cifar else (),
    )


def _known(name: str) -> str:
    for known in NAMES:
        if known.lower() == name.lower():
            return known
    raise DataError(f"there is no data.name '{name}'{nearest(name, NAMES)}", f"known: {', '.join(NAMES)}")


def _part(name: str, root: Path, train: bool, download: bool) -> Any:
    from torchvision import datasets

    old = root / name / "processed"
    if old.is_dir():  # torchvision would still unpickle it
        raw = root / name / "raw"
        raise DataError(f"{old} holds files of an old torchvision", f"remove it; {raw} is read")
    choice: dict[str, Any] = {"split": "train" if train else "test"} if name == "SVHN" else {"train": train}
    if name == "EMNIST":
        choice["split"] = "balanced"
    try:
        return getattr(datasets, name)(str(root), download=download, **choice)
    except ModuleNotFoundError as error:
        raise DataError(
            f"reading {name} needs {error.name}", f"install it: pip install {error.name}"
        ) from error
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        if download:
            raise DataError(
                f"{name} could not be downloaded to {root}: {error}", "check network and disk"
            ) from error
        raise DataError(
            f"{name} is not downloaded, or damaged, in {root}",
            "run `python -m pfedmoe_mpi data prepare OUT.h5 --data.source torchvision "
            f"--data.name {name} --data.path {root}` once on a node with Internet access",
        ) from error


def _pixels(part: Any, name: str) -> np.ndarray:
    pixels = np.asarray(part.data)
    if name == "SVHN":
        return pixels
    if name.startswith("CIFAR"):
        return pixels.transpose(0, 3, 1, 2)
    return (pixels.transpose(0, 2, 1) if name == "EMNIST" else pixels)[:, None]
