"""Conformance of several methods in one job: `mpirun -n 4 python -m support.broken_methods CHECK FILE ...`.

It runs `conformance FILE --check CHECK` for each pair and prints its exit code, until a method ends the job.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pfedmoe_mpi import cli
from pfedmoe_mpi.environment import launched_rank


def main(*words: str) -> None:
    for check, file in zip(words[::2], words[1::2], strict=True):
        code = cli.main(["conformance", file, "--check", check])
        if launched_rank() == 0:
            print(f"{Path(file).stem} ended with {code}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
