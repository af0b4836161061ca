"""A user's weights on disk: checkpoints and exports of this program, safetensors, and files of torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pfedmoe_mpi.checkpoint import Checkpoint

from pfedmoe_mpi.errors import CheckpointError, ConfigError
from pfedmoe_mpi.models.pretrained import Weights
from pfedmoe_mpi.storage import untrusted_hdf5
from pfedmoe_mpi.storage.untrusted_json import UnusableError

HDF5 = (".h5", ".hdf5")
_FREE, _RATIO = 64 << 20, 100  # an export may hold _FREE bytes plus _RATIO times its own length


def read(path: Path, parts: Sequence[str]) -> Mapping[str, Tensor]:
    """Return the float tensors of a file, by name.

    A checkpoint is verified by its seal, and its server's parts are read. Other files are read whole.

    Args:
        parts: the parts of an HDF5 file to try in order; the first that exists is returned.

    Raises:
        ConfigError: the file does not exist, cannot be read or has none of the parts.
    """
    found = _read(path)
    if "" in found:
        return found[""]
    for part in parts:
        if part in found:
            return found[part]
    raise ConfigError(
        f"{path} has no part {' or '.join(parts)}: it holds {', '.join(sorted(found)) or 'no weights'}",
        "use a checkpoint of fedavg or fedjets, or `export` a client of another method",
    )


def read_all(path: Path) -> Weights:
    """Return a file's float tensors by part and name, with its digest.

    Raises:
        ConfigError: the file does not exist, cannot be read or holds no weights.
    """
    parts = _read(path)
    if not any(parts.values()):
        raise ConfigError(f"{path} holds no weights", "use a state_dict, an export or a checkpoint")
    try:
        with path.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "check the file") from error
    return Weights(path, digest, parts)


def _read(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return a file's float tensors by part and name; the only part of a file of others is ""."""
    if not os.path.isfile(path):  # False without permission, too
        raise ConfigError(f"there is no file {path}", "check the path; it is relative to the working folder")
    if path.suffix in HDF5:
        return _from_hdf5(path)
    return {"": _from_safetensors(path) if path.suffix == ".safetensors" else _from_torch(path)}


def _from_hdf5(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a checkpoint's server or of an export, by part and name."""
    import h5py

    from pfedmoe_mpi import checkpoint

    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            is_checkpoint = "server/state" in file
            tensors = {} if is_checkpoint else _float_datasets(file, _FREE + _RATIO * path.stat().st_size)
    except UnusableError as error:
        remedy = "use an `export` or a checkpoint of this program, or a state_dict"
        raise ConfigError(f"{path} cannot be used as weights: {error}", remedy) from error
    except untrusted_hdf5.FROM_HDF5 as error:
        remedy = untrusted_hdf5.opening_remedy(error, path, "check the path")
        raise ConfigError(f"{path} cannot be opened as HDF5: {error}", remedy) from error
    if is_checkpoint:
        try:
            verified = checkpoint.open_verified(path)
        except CheckpointError as error:
            raise ConfigError(error.problem, "use another checkpoint of that run") from error
        with verified as loaded:
            state = torch.from_numpy(loaded.state)
            tensors = {name: view.clone() for name, view in loaded.state_layout.views(state).items()}
            tensors |= _frozen_of_server(loaded)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, slash, inner = name.partition("/")
        if slash and inner:  # a part without names below it is a plain tensor
            parts.setdefault(part, {})[inner] = tensor
    return parts


def _frozen_of_server(loaded: Checkpoint) -> dict[str, Tensor]:
    """Return the frozen tensors of a checkpoint's server, from its run folder; none if it has none."""
    from pfedmoe_mpi.checkpoint import frozen

    if "frozen" not in loaded.identity:
        return {}
    try:
        stored = frozen.read(loaded.path, loaded.identity["frozen"])
    except CheckpointError as error:
        raise ConfigError(error.problem, error.remedy) from error
    tensors: dict[str, Tensor] = {}
    for part, kind in stored.server.items():
        if kind in stored.layouts:
            views = stored.layouts[kind].views(torch.from_numpy(stored.vectors[kind]))
            tensors |= {f"{part}/{name}": view for name, view in views.items()}
    return tensors


def _float_datasets(file: object, limit: int) -> dict[str, Tensor]:
    """Return every float dataset by its path.

    Raises:
        UnusableError: one of them claims more than `limit` bytes, has no values, or is not stored in the file
            (virtual or external), or a name is not UTF-8.
    """
    import h5py

    assert isinstance(file, h5py.File)
    tensors: dict[str, Tensor] = {}

    def visit(name: str | bytes, item: object) -> None:
        if not isinstance(name, str):
            raise UnusableError(f"the name {name!a} is not UTF-8")
        if isinstance(item, h5py.Dataset) and item.dtype.kind == "f":
            untrusted_hdf5.find_dataset(file, name)
            if item.nbytes > limit:
                raise UnusableError(f"{name} claims {item.nbytes:,} bytes")
            tensors[name] = torch.tensor(item[()], dtype=torch.float32)

    file.visititems(visit)
    return tensors


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the float tensors of a file of the package safetensors."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        problem = f"{path} needs the package safetensors, which is not installed"
        raise ConfigError(problem, "pip install 'pfedmoe_mpi[safetensors]'") from error
    try:
        return _floats(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        problem = f"{path} is not a safetensors file, or is damaged: {error}"
        raise ConfigError(problem, "check the path, or copy the file again") from error


def _from_torch(path: Path) -> dict[str, Tensor]:
    """Return the float tensors of a state_dict; `weights_only` keeps pickles from running code."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        problem = f"{path} cannot be read as weights, or holds more than tensors: {reason}"
        raise ConfigError(problem, "write it with torch.save(model.state_dict(), FILE)") from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(map(_is_plain, loaded.values())):
        raise ConfigError(
            f"{path} is not a state_dict, that is, dense tensors by name",
            "write it with torch.save(model.state_dict(), FILE)",
        )
    return _floats(loaded)


def _floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    floats = {name: t for name, t in tensors.items() if t.is_floating_point()}
    return {str(name): t.detach().float().contiguous() for name, t in floats.items()}


def _is_plain(value: object) -> bool:
    """Return whether a value is a tensor with its numbers in memory: neither sparse nor without storage."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
