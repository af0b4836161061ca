"""Start MPI, and see whether the launcher belongs to it."""

from __future__ import annotations

import os
import warnings

from pfedmoe_mpi.environment import launched_size
from pfedmoe_mpi.errors import LaunchError
from pfedmoe_mpi.mpi.comm import Comm


def start(allow_singleton: bool = False) -> Comm:
    """Start MPI and return the world communicator.

    Args:
        allow_singleton: accept a single rank where the launcher started several.

    Raises:
        LaunchError: there is no MPI library, or the launcher belongs to another MPI, so that ranks do not see
            each other.
    """
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = True
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"mpi4py cannot load an MPI library: {str(error).splitlines()[0]}",
            "on a cluster, load its MPI module in the job script (module load mpich); "
            "elsewhere: pip install 'pfedmoe_mpi[mpich]'",
        ) from error
    if not MPI.Is_initialized():
        with warnings.catch_warnings():  # mpi4py warns of a mismatched launcher too, on every rank
            warnings.simplefilter("ignore", RuntimeWarning)
            MPI.Init_thread(MPI.THREAD_FUNNELED)
    world = Comm(MPI.COMM_WORLD)
    launched = launched_size(os.environ)
    if world.size == 1 and launched > 1 and not allow_singleton:
        plugin = "pmix" if "Open MPI" in library() else "pmi2"
        raise LaunchError(
            f"the launcher started {launched} ranks, but each believes it is alone: mpi4py uses {library()}, "
            "and the launcher belongs to another MPI",
            f"start with the mpirun of that MPI or `srun --mpi={plugin}`; "
            "to run a single rank, add --run.singleton true",
        )
    return world


def library() -> str:
    """Return the name and version of the MPI library."""
    from mpi4py import MPI

    return " ".join(MPI.Get_library_version().splitlines()[0].strip("\0").split())
