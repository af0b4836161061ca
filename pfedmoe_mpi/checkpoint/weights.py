"""Weights that a user has on disk: checkpoints and exports of this program, and torch's own files."""

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
    """The named float tensors of a file.

    Args:
        parts: of an HDF5 file, the parts that will do; the first one there is, is taken. A checkpoint is
            verified by its seal and gives the server's parts, an export what it holds.

    Raises:
        ConfigError: there is no such file, or it holds no such thing.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}", "check the path; it counts from the working folder")
    return _from_hdf5(path, parts) if path.suffix in HDF5 else _from_torch(path)


def _from_hdf5(path: Path, parts: Sequence[str]) -> dict[str, Tensor]:
    import h5py

    from pfedmoe_mpi import checkpoint

    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            sealed = "server/state" in file
            found = {} if sealed else _exported(file)
    except OSError as error:
        raise ConfigError(f"{path} is no HDF5 file: {error}", "check the path") from error
    if sealed:
        try:
            checkpoint.verify(path)
        except CheckpointError as error:
            raise ConfigError(error.problem, "take another checkpoint of that run") from error
        with checkpoint.Checkpoint(path) as loaded:
            state = torch.from_numpy(loaded.state)
            found = {name: view.clone() for name, view in loaded.state_layout.views(state).items()}
    for part in parts:
        own = {name.removeprefix(f"{part}/"): t for name, t in found.items() if name.startswith(f"{part}/")}
        if own:
            return own
    held = ", ".join(sorted({name.partition("/")[0] for name in found})) or "no weights"
    raise ConfigError(
        f"{path} has no part {' or '.join(parts)}: it holds {held}",
        "take a checkpoint of fedavg or fedjets, or a client of another method by `export`",
    )


def _exported(file: object) -> dict[str, Tensor]:
    """Every float dataset by its path."""
    import h5py

    assert isinstance(file, h5py.File)
    found: dict[str, Tensor] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind == "f":
            found[name] = torch.tensor(item[()], dtype=torch.float32)

    file.visititems(visit)
    return found


def _from_torch(path: Path) -> dict[str, Tensor]:
    """A state_dict; `weights_only` keeps pickles from running anything."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (
            "a whole module, or no torch file" if not zipfile.is_zipfile(path) else "not of tensors alone"
        )
        problem = f"{path} cannot be read as weights ({reason}): {str(error).splitlines()[0]}"
        raise ConfigError(problem, "write it with torch.save(model.state_dict(), FILE)") from error
    if isinstance(held, Mapping) and isinstance(held.get("state_dict"), Mapping):
        held = held["state_dict"]
    if not isinstance(held, Mapping) or not all(isinstance(t, Tensor) for t in held.values()):
        raise ConfigError(
            f"{path} is no state_dict: names and tensors",
            "write it with torch.save(model.state_dict(), FILE)",
        )
    floats = {name: t for name, t in held.items() if t.is_floating_point()}
    return {str(name): t.detach().float().contiguous() for name, t in floats.items()}
