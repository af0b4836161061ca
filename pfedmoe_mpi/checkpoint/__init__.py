"""Checkpoints: one sealed HDF5 file each, written by all ranks and readable with any HDF5 tool."""

from pfedmoe_mpi.checkpoint.places import Places, files_needed, is_name
from pfedmoe_mpi.checkpoint.reader import Checkpoint, open_everywhere, verify
from pfedmoe_mpi.checkpoint.seal import FORMAT
from pfedmoe_mpi.checkpoint.writer import Content, name, newest_first, restart_points, write

__all__ = [
    "FORMAT",
    "Checkpoint",
    "Content",
    "Places",
    "files_needed",
    "is_name",
    "name",
    "newest_first",
    "open_everywhere",
    "restart_points",
    "verify",
    "write",
]
