"""`export`: one client's model as a file of its own."""

from __future__ import annotations

from pathlib import Path

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.checkpoint import client_file
from pfedmoe_mpi.errors import EXIT_DONE
from pfedmoe_mpi.federation.rebuilt import vectors


def run(path: Path, client: int, out: Path) -> int:
    """Write the model of one client of a checkpoint to `out`, and return the exit code.

    Raises:
        CheckpointError: the checkpoint is damaged, has no such client, or `out` exists or cannot be written.
    """
    with checkpoint.open_verified(path) as loaded:
        client_file.write(loaded, client, vectors(loaded), out)
    print(f"wrote client {client} of {path} to {out}")
    return EXIT_DONE
