"""The program with a fault: `mpirun -n 3 python -m support.fault_injection ACTION RANK PHASE ARGUMENT ...`.

ACTION is `raise`, `refuse` or `stop`: on RANK (or on `all` ranks) PHASE's function raises an exception or an
error with a message, or its process gets SIGUSR1, at the call that `PHASES` names; `PHASE:NUMBER` names
another one. The program itself is unchanged.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from pfedmoe_mpi import cli, environment
from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.checkpoint import writer
from pfedmoe_mpi.errors import UserError
from pfedmoe_mpi.federation import build, evaluation, loop, metrics, pretraining, problem, round_sum, training
from pfedmoe_mpi.mpi import comm
from pfedmoe_mpi.run import folder

# phase: (owner of the function, its name, which call raises)
PHASES: dict[str, tuple[Any, str, int]] = {
    "data": (problem, "open_everywhere", 1),
    "clients": (build, "distribute", 1),
    "folder": (folder.RunFolder, "log_to_file", 1),
    "preparation": (pretraining, "inputs", 1),
    "training": (training, "train_member", 2),
    "contribution": (round_sum.RoundSum, "add", 2),
    "sum": (comm.Comm, "sum", 3),
    "update": (Algorithm, "server_update", 2),
    "evaluation": (evaluation, "_client_metrics", 2),
    "record": (metrics, "row", 2),
    "layout": (writer, "_lay_out", 2),
    "write": (writer, "_write_clients", 2),
    "seal": (writer, "_finish", 2),
    "end": (loop.Loop, "run", 1),
}
ROOT_PHASES = {"layout", "seal"}
# Flags of a run in which clients are prepared; in other runs the phase is not reached.
PREPARED = (
    *("--algorithm", "fedjets", "--model.pool", "mlp5"),
    *("--fedjets.anchors", "clusters", "--fedjets.common_target", "0"),
)


class Injected(Exception):
    """An exception that the program does not expect."""


def inject(action: str, phase: str) -> None:
    """Make the function of a phase raise, or send its process a signal."""
    phase, _, number = phase.partition(":")
    owner, name, usual = PHASES[phase]
    call = int(number or usual)
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def raising(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            print(f"fault at {time.time()}", flush=True)
        if calls == call and action == "raise":
            raise Injected(phase)
        if calls == call and action == "refuse":
            raise UserError(f"Injected: {phase}", "the remedy")
        if calls == call:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*arguments, **keywords)

    setattr(owner, name, raising)


if __name__ == "__main__":
    action, rank, phase, *arguments = sys.argv[1:]
    if rank == "all" or int(rank) == environment.launched_rank():
        inject(action, phase)
    sys.exit(cli.main(arguments))
