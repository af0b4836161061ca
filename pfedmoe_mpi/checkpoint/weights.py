"""A user's weights on disk: checkpoints and exports of this program, and files of torch."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pfedmoe_mpi.errors import CheckpointError, ConfigError

HDF5 = (".h5", ".hdf5")


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
    from pfedmoe_mpi.storage import untrusted_hdf5

    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            is_checkpoint = "server/state" in file
            tensors = {} if is_checkpoint else _float_datasets(file)
    except OSError as error:
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


def _float_datasets(file: object) -> dict[str, Tensor]:
    """Return every float dataset by its path."""
    import h5py

    assert isinstance(file, h5py.File)
    tensors: dict[str, Tensor] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind == "f":
            tensors[name] = torch.tensor(item[()], dtype=torch.float32)

    file.visititems(visit)
    return tensors


def _from_torch(path: Path) -> dict[str, Tensor]:
    """Return the float tensors of a state_dict; `weights_only` keeps pickles from running code."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = "not a file of torch.save" if not zipfile.is_zipfile(path) else "it holds more than tensors"
        problem = f"{path} cannot be read as weights ({reason}): {str(error).splitlines()[0]}"
        raise ConfigError(problem, "write it with torch.save(model.state_dict(), FILE)") from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ConfigError(
            f"{path} is not a state_dict, that is, tensors by name",
            "write it with torch.save(model.state_dict(), FILE)",
        )
    floats = {name: t for name, t in loaded.items() if t.is_floating_point()}
    return {str(name): t.detach().float().contiguous() for name, t in floats.items()}
