"""A command's way under MPI: start, work, leave together with one exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from pfedmoe_mpi.errors import (
    EXIT_FAULT,
    EXIT_USER,
    LaunchError,
    MessageError,
    RunError,
    StoppedError,
    UserError,
)

if TYPE_CHECKING:
    from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.environment import SIGNALS, code_version, launched_rank, launched_size
from pfedmoe_mpi.log import LOGGER


def under_mpi(work: Callable[[Comm, str], int], singleton: bool = False, met: UserError | None = None) -> int:
    """Start MPI, do `work(world, code version)`, leave together.

    A UserError or RunError is met by all ranks and told by one; anything else ends the whole job at once with
    this rank's traceback. `met` is what this rank met before: then no rank works.
    """
    from pfedmoe_mpi.mpi import comm

    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until `catch_signals`
    code = code_version() if launched_rank() == 0 and not met else ""
    world = comm.start(singleton)
    world.catch_signals()
    try:
        world.agree(lambda: _raise(met), "arguments")
        result = work(world, code)
    except (UserError, RunError) as error:
        if world.rank == 0:
            LOGGER.error(str(error))
            print_error(error)
        result = EXIT_USER if isinstance(error, UserError) else EXIT_FAULT
    except StoppedError:  # met by all ranks, where there is nothing to save
        if world.rank == 0:
            print("stopped", file=sys.stderr, flush=True)
        result = EXIT_FAULT
    except BaseException as error:
        LOGGER.exception("the job ends")
        world.fault(error)
    world.finish()
    return result


def print_error(error: MessageError) -> None:
    """Once, also where every rank believes it is alone."""
    if launched_rank() == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)


def _raise(error: UserError | None) -> None:
    if error:
        raise error


def refuse(error: UserError) -> int:
    """End a command whose arguments are wrong, before MPI is started; return the exit code.

    Ranks meet first: Open MPI's launcher ends all at the first non-zero exit, maybe before rank 0 has spoken,
    and a file may be missing on one host only.
    """
    if launched_size(os.environ) > 1:
        try:
            return under_mpi(lambda world, code: EXIT_USER, singleton=True, met=error)
        except LaunchError:  # no MPI at all
            pass
    print_error(error)
    return EXIT_USER
