"""`weights fetch`: published weights of torchvision's and timm's networks as files for `model.weights`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pfedmoe_mpi.errors import ConfigError, nearest
from pfedmoe_mpi.models.names import TORCHVISION, resolve_name
from pfedmoe_mpi.storage import durable
from pfedmoe_mpi.user_code import TIMM

if TYPE_CHECKING:
    from torch import Tensor

StateDict = Mapping[str, "Tensor"]


def fetch(names: Sequence[str], folder: Path) -> list[str]:
    """Write the default weights of networks into a folder, as `NAME.pth`; the only place that downloads them.

    torchvision and timm keep what they download in caches of their own, and take it from there again.

    Returns:
        a line about each file.

    Raises:
        ConfigError: a network is unknown or has no weights, a file exists, or the download failed; then the
            files before it are complete.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f"there is no folder {folder}", f"make it first: mkdir -p {folder}")
    sources = {name: _source(name) for name in dict.fromkeys(map(_exact, names))}
    paths = {name: folder / f"{name.replace(':', '-')}.pth" for name in sources}
    for path in paths.values():
        if os.path.lexists(path):
            raise ConfigError(f"{path} exists and is not overwritten", "move it away, or use another --out")
    return [_write(name, sources[name], path) for name, path in paths.items()]


def _exact(name: str) -> str:
    return name if name.startswith(TIMM) else resolve_name(name)


def _source(name: str) -> Callable[[], StateDict]:
    """Return the function that fetches a network's weights; nothing is fetched yet."""
    if name.startswith(TIMM):
        return _timm(name)
    if name not in TORCHVISION:
        problem = f"there are no published weights of {name}"
        raise ConfigError(problem, "use a network of torchvision such as resnet18, or timm:NAME")
    from torchvision.models import get_model_weights

    weights = get_model_weights(name).DEFAULT
    return lambda: weights.get_state_dict(progress=False, check_hash=True, map_location="cpu")


def _timm(name: str) -> Callable[[], StateDict]:
    try:
        import timm
    except ImportError as error:
        problem = f"{name} needs the package timm, which is not installed"
        raise ConfigError(problem, "pip install 'pfedmoe_mpi[timm]'") from error
    own, pretrained = name.removeprefix(TIMM), timm.list_models(pretrained=True)
    known = {one.partition(".")[0] for one in pretrained} | set(pretrained)
    if own not in known:
        problem = f"timm has no weights of '{own}'{nearest(own, known)}"
        remedy = "list the names: python -c 'import timm; print(timm.list_models(pretrained=True))'"
        raise ConfigError(problem, remedy)
    return lambda: timm.create_model(own, pretrained=True).state_dict()


def _write(name: str, source: Callable[[], StateDict], path: Path) -> str:
    import torch

    try:
        tensors = dict(source())
    except Exception as error:  # of the libraries for HTTP, of torch and timm
        reason = (str(error) or type(error).__name__).splitlines()[0]
        problem = f"the weights of {name} could not be fetched: {reason}"
        raise ConfigError(problem, "run it on a node with Internet access, such as a login node") from error
    try:
        with durable.new_file(path) as new:
            torch.save(tensors, new)
    except (OSError, RuntimeError) as error:
        problem = f"{path} cannot be written: {error}"
        raise ConfigError(problem, "check the folder's space and permissions") from error
    stem = " --model.stem imagenet" if "resne" in name and name in TORCHVISION else ""
    numbers = sum(tensor.numel() for tensor in tensors.values())
    return f"{path}: {numbers:,} numbers; use --model.pool {name} --model.weights {name}={path}{stem}"
