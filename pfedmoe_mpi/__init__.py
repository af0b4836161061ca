"""Personalised federated learning with mixtures of experts under MPI.

A module imports only from its own line and the lines below it:

    cli, api     the command line; runs from Python
    commands, bench, conformance, reproduce, report
                 the commands
    run, client_model
                 one training run: start, restart, run folder, exit code; a client's model for a notebook
    federation   the rounds: cohort, training, sums, metrics, when to write a checkpoint
    algorithms   the methods, one file each; `base` is their contract
    checkpoint, data
                 sealed checkpoint files; data sources and partitions
    mpi, core    communication and signals; vectors, batches, SGD and random addresses
    config       settings with their defaults and reasons
    models       architectures and the gate
    user_code    code from outside of the package: files and installed modules
    storage, environment, errors, log
                 durable writes, launcher and Slurm, error classes and exit codes, logger
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pfedmoe_mpi._version import __version__

if TYPE_CHECKING:
    from pfedmoe_mpi.api import restart, train
    from pfedmoe_mpi.client_model import ClientModel
    from pfedmoe_mpi.report.load import load_run

__all__ = ["__version__", "load_client", "load_run", "restart", "train"]


def load_client(
    path: str | os.PathLike[str],
    client: int | None = None,
    code: str | os.PathLike[str] | None = None,
    changed_code: bool = False,
) -> ClientModel:
    """Return a client's whole personalised model, as a torch module with `predict`.

    Args:
        path: a checkpoint, or a file written by `export`.
        client: number of the client; needed for a checkpoint.
        code: folder of your own models' and methods' files, such as RUN_DIR/code, if they are no longer where
            they were in the run. These files are run, so use only code that you trust.
        changed_code: accept that they changed since the run.

    Raises:
        CheckpointError: the file is damaged, there is no such client, or the method has no prediction for a
            client that never trained.
    """
    from pathlib import Path

    from pfedmoe_mpi import client_model  # imports torch, which many commands do not need

    return client_model.load(Path(path), client, None if code is None else Path(code), changed_code)


def __getattr__(name: str) -> Any:
    """Import a function on first use: `--help` needs neither numpy nor MPI."""
    if name == "load_run":
        from pfedmoe_mpi.report.load import load_run

        return load_run
    if name in {"restart", "train"}:
        from pfedmoe_mpi import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
