"""`python -m pfedmoe_mpi`."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

IMPORTING = "<frozen importlib._bootstrap>"


def main() -> None:
    """Run the program; the console script calls this too.

    SIGUSR1 is blocked until its handler is installed: it would end the process while Python still starts.
    Ctrl-C ends the process without a traceback until MPI's handler turns it into a request to stop.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGINT})
    from pfedmoe_mpi import environment  # noqa: F401  # whole before `end_interrupted` may need it

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job ignores Ctrl-C
        signal.signal(signal.SIGINT, interrupt)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        from pfedmoe_mpi.storage import streams

        output = streams.open_standard()
        from pfedmoe_mpi import cli
        from pfedmoe_mpi.errors import EXIT_FAULT

        code = cli.main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        end_interrupted()
    if output.failure:
        print(f"warning: standard output cannot be written: {output.failure.strerror}", file=sys.stderr)
        code = code or EXIT_FAULT
    sys.exit(code)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, which removes files half written; during an import end at once.

    Many packages do not survive an exception that interrupts the import of their libraries.
    """
    while frame:
        if frame.f_code.co_filename == IMPORTING:
            end_interrupted()
        frame = frame.f_back
    raise KeyboardInterrupt


def end_interrupted() -> NoReturn:
    """End as programs do at Ctrl-C: by the signal, so that a shell's loop ends too.

    A launcher would report a crash then, so under one the exit code is that of a shell, 128 + SIGINT.
    """
    from pfedmoe_mpi.environment import launched_size

    if launched_size(os.environ) == 1:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
