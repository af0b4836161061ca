"""`python -m pfedmoe_mpi`."""

import sys

from pfedmoe_mpi.cli import main as _main


def main() -> None:
    """Entry point of the program and of the console script."""
    sys.exit(_main(sys.argv[1:]))


if __name__ == "__main__":
    main()
