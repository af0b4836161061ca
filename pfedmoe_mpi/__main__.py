"""`python -m pfedmoe_mpi`."""

import signal
import sys


def main() -> None:
    """Entry point of the program and of the console script.

    A stop that is asked for while Python still starts is held back, not lost: SIGUSR1 would end the process.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    from pfedmoe_mpi import cli

    sys.exit(cli.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
