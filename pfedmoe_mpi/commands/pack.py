"""`pack`: a checkpoint that relies on other files as one complete file."""

from __future__ import annotations

from pathlib import Path

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.checkpoint import pack
from pfedmoe_mpi.errors import EXIT_DONE


def run(path: Path, out: Path) -> int:
    """Write a checkpoint with all the vectors that it relies on to `out`, and return the exit code.

    Raises:
        CheckpointError: the checkpoint is damaged or relies on a missing file, or `out` exists or cannot be
            written.
    """
    with checkpoint.open_verified(path) as loaded:
        pack.write(loaded, out)
    print(f"wrote {path}, complete, to {out}")
    return EXIT_DONE
