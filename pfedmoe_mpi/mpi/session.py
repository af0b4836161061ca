"""A command under MPI: start together, do the work, end together with one exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pfedmoe_mpi.errors import (
    EXIT_FAULT,
    EXIT_USER,
    ConfigError,
    LaunchError,
    MessageError,
    RunError,
    StoppedError,
    UserError,
)

if TYPE_CHECKING:
    from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.environment import (
    OPEN_FILES,
    SIGNALS,
    code_version,
    launched_rank,
    launched_size,
    raise_file_limit,
)
from pfedmoe_mpi.log import LOGGER

T = TypeVar("T")


def under_mpi(
    work: Callable[[Comm, str], int],
    given: Mapping[str, Any],
    singleton: bool = False,
    earlier: UserError | None = None,
) -> int:
    """Start MPI, do `work(world, code version)` and end together; return the exit code.

    All ranks raise a UserError or RunError together, and rank 0 prints it. Any other exception ends the whole
    job at once with this rank's traceback.

    Args:
        work: returns the exit code.
        given: the arguments and settings of the command, which must be equal on all ranks.
        singleton: accept a single rank where the launcher started several.
        earlier: this rank's error from before MPI was started; if any rank has one, no rank does the work.

    Raises:
        LaunchError: MPI cannot be started here.
    """
    from pfedmoe_mpi.mpi import launch

    files = raise_file_limit()
    if files < OPEN_FILES:
        raise LaunchError(
            f"ulimit -n = {files}, but a rank opens up to {OPEN_FILES} files",
            "put `ulimit -n 1024` before mpirun, on every host",
        )
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until `catch_signals`
    code = code_version() if launched_rank() == 0 and not earlier else ""
    world = launch.start(singleton)
    world.catch_signals()
    try:
        _check_start(world, given, earlier)
        result = work(world, code)
    except (UserError, RunError) as error:
        if world.rank == 0:
            LOGGER.error(str(error))
            print_error(error)
        result = EXIT_USER if isinstance(error, UserError) else EXIT_FAULT
    except StoppedError:  # raised on all ranks, where there is nothing to save
        if world.rank == 0:
            cause = world.stopped_by or "a signal to another rank"
            text = f"stopped by {cause} with nothing to save; run the command again"
            print(text, file=sys.stderr, flush=True)
        result = EXIT_FAULT
    except BaseException as error:
        LOGGER.exception("unexpected error, the job ends")
        world.fault(error)
    world.finish()
    return result


def call_under_mpi(prepare: Callable[[], tuple[Mapping[str, Any], Callable[[Comm, str], T]]]) -> T:
    """Start MPI, or use it again, and return the result of `work(world, code version)`; for Python's callers.

    Errors are raised and not printed, and the signal handlers are afterwards those of before.

    Args:
        prepare: returns `given`, as for `under_mpi`, and `work`; not collective.

    Raises:
        UserError, RunError: of `prepare` on any rank, or of `work`: on all ranks.
        ConfigError: this is not the main thread, which alone receives signals.
    """
    from pfedmoe_mpi.mpi import launch

    if threading.current_thread() is not threading.main_thread():
        problem = "a run was started in another thread than the main one"
        raise ConfigError(problem, "use one process per run")
    code = code_version() if launched_rank() == 0 else ""
    earlier: UserError | None = None
    given: Mapping[str, Any] = {}
    try:
        given, work = prepare()
    except UserError as error:
        earlier = error  # the other ranks wait for this one
    world = launch.start()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    world.catch_signals()
    try:
        _check_start(world, given, earlier)
        return work(world, code)
    except (UserError, RunError, StoppedError):
        raise
    except BaseException as error:
        if world.size > 1:  # the other ranks wait for this one
            world.fault(error)
        raise
    finally:
        world.finish()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def print_error(error: MessageError) -> None:
    """Print an error on the launcher's first rank only, even if every rank believes it is alone."""
    if launched_rank() == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)


def _check_start(world: Comm, given: Mapping[str, Any], earlier: UserError | None) -> None:
    """Raise an error of any rank from before MPI was started, or one about ranks that were not started alike.

    Raises:
        UserError: on all ranks.
    """
    from pfedmoe_mpi.mpi import alike

    facts: dict[str, str] = {}

    def digest() -> str:
        if earlier:
            raise earlier
        if world.size > 1:
            facts.update(alike.facts(given))
        return alike.digest(facts)

    if len(set(world.agree(digest, "arguments"))) > 1:
        raise alike.difference(world.gather(facts, "differences"))


def refuse(error: UserError) -> int:
    """Print an error that was found before MPI was started; return the exit code.

    The ranks start MPI first and end together: Open MPI's launcher ends all of them at the first non-zero
    exit, which may come before rank 0 has printed, and a file may be missing on one host only.
    """
    if launched_size(os.environ) > 1:
        try:
            return under_mpi(lambda world, code: EXIT_USER, {}, singleton=True, earlier=error)
        except LaunchError:  # no MPI at all
            pass
    print_error(error)
    return EXIT_USER
