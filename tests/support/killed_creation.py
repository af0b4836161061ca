"""Every state of a run folder killed while it is made: `python -m support.killed_creation ARGUMENT ...`.

The program runs in the folders 1, 2, … below the current one, with `--run.dir new`, and ends without any
clean-up just before its 1st, 2nd, … call that creates, renames or removes something in its run folder. The
last folder is the first whose events.jsonl says that the run has started.
"""

from __future__ import annotations

import os
import sys
from itertools import count
from pathlib import Path
from typing import Any

from pfedmoe_mpi import cli
from pfedmoe_mpi.federation import build, loop  # noqa: F401  # torch is imported once, before the forks

CALLS = {"os.mkdir", "os.rename", "os.remove", "os.link"}


def end_before(step: int) -> None:
    """End this process before the given call."""
    done = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_CREAT | os.O_RDWR)
        if (event in CALLS or writes) and "/new" in str(arguments[0]):
            done += 1
            if done == step:
                os._exit(9)

    sys.addaudithook(hook)


if __name__ == "__main__":
    for number in count(1):
        folder = Path(str(number))
        folder.mkdir()
        child = os.fork()
        if not child:
            os.chdir(folder)
            end_before(number)
            os._exit(cli.main([*sys.argv[1:], "--run.dir", "new"]))
        os.waitpid(child, 0)
        if (folder / "new" / "events.jsonl").exists():
            break
