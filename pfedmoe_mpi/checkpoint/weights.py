"""A user's weights on disk: checkpoints and exports of this program, and files of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pfedmoe_mpi.errors import CheckpointError, ConfigError
from pfedmoe_mpi.storage import untrusted_hdf5
from pfedmoe_mpi.storage.untrusted_json import UnusableError

HDF5 = (".h5", ".hdf5")
_FREE, _RATIO = 64 << 20, 100  # an export may hold _FREE bytes plus _RATIO times its own length


def read(path: Path, parts: Sequence[str]) -> dict[str, Tensor]:
    """Return the float tensors of a file, by name.

    A checkpoint is verified by its seal, and its server's parts are read. A file of torch is read whole.

    Args:
        parts: the parts of an HDF5 file to try in order; the first that exists is returned.

    Raises:
        ConfigError: the file does not exist, cannot be read or has none of the parts.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}", "check the path; it is relative to the working folder")
    return _from_hdf5(path, parts) if path.suffix in HDF5 else _from_torch(path)


def _from_hdf5(path: Path, parts: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of the first of `parts` in a checkpoint or an export."""
    import h5py

    from pfedmoe_mpi import checkpoint

    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            is_checkpoint = "server/state" in file
            tensors = {} if is_checkpoint else _float_datasets(file, _FREE + _RATIO * path.stat().st_size)
    except untrusted_hdf5.FROM_HDF5 as error:
        remedy = untrusted_hdf5.opening_remedy(error, path, "check the path")
        raise ConfigError(f"{path} cannot be opened as HDF5: {error}", remedy) from error
    if is_checkpoint:
        try:
            checkpoint.verify(path)
        except CheckpointError as error:
            raise ConfigError(error.problem, "use another checkpoint of that run") from error
        with checkpoint.Checkpoint(path) as loaded:
            state = torch.from_numpy(loaded.state)
            tensors = {name: view.clone() for name, view in loaded.state_layout.views(state).items()}
    for part in parts:
        of_part = {k.removeprefix(f"{part}/"): t for k, t in tensors.items() if k.startswith(f"{part}/")}
        if of_part:
            return of_part
    content = ", ".join(sorted({name.partition("/")[0] for name in tensors})) or "no weights"
    raise ConfigError(
        f"{path} has no part {' or '.join(parts)}: it holds {content}",
        "use a checkpoint of fedavg or fedjets, or `export` a client of another method",
    )


def _float_datasets(file: object, limit: int) -> dict[str, Tensor]:
    """Return every float dataset by its path.

    Raises:
        UnusableError: one of them claims more than `limit` bytes, or a name is not UTF-8.
    """
    import h5py

    assert isinstance(file, h5py.File)
    tensors: dict[str, Tensor] = {}

    def visit(name: str | bytes, item: object) -> None:
        if not isinstance(name, str):
            raise UnusableError(f"the name {name!a} is not UTF-8")
        if isinstance(item, h5py.Dataset) and item.dtype.kind == "f":
            if item.nbytes > limit:
                raise UnusableError(f"{name} claims {item.nbytes:,} bytes")
            tensors[name] = torch.tensor(item[()], dtype=torch.float32)

    file.visititems(visit)
    return tensors


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
    floats = {name: t for name, t in loaded.items() if t.is_floating_point()}
    return {str(name): t.detach().float().contiguous() for name, t in floats.items()}


def _is_plain(value: object) -> bool:
    """Return whether a value is a tensor with its numbers in memory: neither sparse nor without storage."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
