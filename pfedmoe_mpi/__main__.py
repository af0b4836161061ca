"""`python -m pfedmoe_mpi`."""

import signal
import sys


def main() -> None:
    """Run the program; the console script calls this too.

    SIGUSR1 is blocked until its handler is installed: it would end the process while Python still starts.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    from pfedmoe_mpi import cli

    sys.exit(cli.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
