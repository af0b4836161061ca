"""Checkpoints: one sealed HDF5 file each, written by all ranks and readable with any HDF5 tool."""

from pfedmoe_mpi.checkpoint.folder import name, newest, newest_first, restart_points
from pfedmoe_mpi.checkpoint.opened import Opened, OpenFiles
from pfedmoe_mpi.checkpoint.places import Places, files_needed, is_name
from pfedmoe_mpi.checkpoint.reader import (
    Checkpoint,
    load_everywhere,
    open_everywhere,
    open_files_everywhere,
    open_verified,
    verify,
)
from pfedmoe_mpi.checkpoint.seal import FORMAT
from pfedmoe_mpi.checkpoint.writer import Content, write

__all__ = [
    "FORMAT",
    "Checkpoint",
    "Content",
    "OpenFiles",
    "Opened",
    "Places",
    "files_needed",
    "is_name",
    "load_everywhere",
    "name",
    "newest",
    "newest_first",
    "open_everywhere",
    "open_files_everywhere",
    "open_verified",
    "restart_points",
    "verify",
    "write",
]
