"""The command `conformance`: every check on every method, and a line for each verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfedmoe_mpi import config, user_code
from pfedmoe_mpi.config import methods
from pfedmoe_mpi.errors import EXIT_DONE, EXIT_FAULT, ConfigError, nearest
from pfedmoe_mpi.mpi.session import under_mpi

if TYPE_CHECKING:  # checks.py imports torch, which is imported only after the arguments were checked
    from pfedmoe_mpi.conformance.checks import Case
    from pfedmoe_mpi.mpi.comm import Comm

CHECKS = ("documented", "layouts", "moves", "fixpoint", "wire", "idle", "ranks", "restart", "midround")
TIMEOUT = 20.0  # seconds after which a rank that misses a collective ends the job


def run(words: Sequence[str], chosen: Sequence[str], overrides: Mapping[str, Any]) -> int:
    """Check methods, by default all installed ones; return the exit code, 1 if a check failed.

    Args:
        words: methods, by name or file.
        chosen: names of checks; empty for all.
        overrides: settings of all federations.

    Raises:
        ConfigError: there is no such method or check, or a setting is wrong.
    """
    for name in chosen:
        if name not in CHECKS:
            raise ConfigError(
                f"there is no check '{name}'{nearest(name, CHECKS)}", f"use {', '.join(CHECKS)}"
            )
    algorithms = [user_code.located(word, Path.cwd()) for word in words] or list(methods.names())
    for algorithm in algorithms:
        config.build({**overrides, "algorithm": algorithm})
    given = {"command": "conformance", "methods": algorithms, "checks": list(chosen), **overrides}
    return under_mpi(lambda world, _: _check(world, algorithms, chosen or CHECKS, overrides), given)


def _check(
    world: Comm, algorithms: Sequence[str], chosen: Sequence[str], overrides: Mapping[str, Any]
) -> int:
    """Run the checks; collective."""
    import torch

    from pfedmoe_mpi.conformance import checks

    if world.size < checks.RANKS:
        problem = f"conformance needs {checks.RANKS} ranks, and this job has {world.size}"
        raise ConfigError(problem, "mpirun -n 4 python -m pfedmoe_mpi conformance METHOD")
    torch.set_num_threads(1)
    world.timeout = TIMEOUT
    verdicts = [
        _verdict(world, getattr(checks, name), checks.Case(algorithm, overrides))
        for algorithm in algorithms
        for name in chosen
    ]
    return EXIT_DONE if all(verdicts) else EXIT_FAULT


def _verdict(world: Comm, check: Callable[[Comm, Case], None], case: Case) -> bool:
    """Run one check, print its verdict and return, on all ranks, whether it passed."""
    try:
        check(world, case)
        failure = ""
    except AssertionError as error:
        failure = str(error) or "an assertion without a message failed"
    except Exception as error:  # the other ranks may be waiting for this one: the job ends
        error.add_note(f"during {check.__name__} of {user_code.label(case.algorithm)}, the last check")
        raise
    failures = [item for item in world.gather(failure, "verdict") if item]
    if world.rank == 0:
        name = user_code.label(case.algorithm)
        print(f"{check.__name__} {name}: {'FAIL ' + failures[0] if failures else 'pass'}", flush=True)
    return not failures
