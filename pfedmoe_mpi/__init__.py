"""Personalised federated learning with mixtures of experts under MPI."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pfedmoe_mpi._version import __version__
from pfedmoe_mpi.report.load import load_run

if TYPE_CHECKING:
    from pfedmoe_mpi.client_model import ClientModel

__all__ = ["__version__", "load_client", "load_run"]


def load_client(path: str | os.PathLike[str], client: int | None = None) -> ClientModel:
    """A client's whole personalised model, as a torch module with `predict`.

    Args:
        path: a checkpoint, of which `client` says whose, or a file that `export` wrote.

    Raises:
        CheckpointError: a damaged file, no such client, or one for which its method has no answer.
    """
    from pathlib import Path

    from pfedmoe_mpi import client_model  # needs torch, which the command line often does not

    return client_model.load(Path(path), client)
