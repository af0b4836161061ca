"""The result of one check of `check`, and what the checks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pfedmoe_mpi.mpi.comm import Comm


@dataclass(frozen=True)
class Finding:
    """The result of one check, printed as one line; `todo` is the remedy of a failure, else advice."""

    ok: bool
    text: str
    todo: str = ""

    def __str__(self) -> str:
        if not self.ok:
            return f"FAIL {self.text}; remedy: {self.todo}"
        return f"note {self.text}; advice: {self.todo}" if self.todo else f"ok   {self.text}"


def count_text(number: int, what: str) -> str:
    """Return `1 rank` or `2 ranks`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def errors_of(world: Comm, work: Callable[[], object], purpose: str) -> str:
    """Do `work` on every rank, and return the error messages by rank, or ""; collective."""
    try:
        work()
        message = ""
    except (OSError, RuntimeError, ValueError) as error:
        message = str(error) or type(error).__name__
    messages = world.gather(message, purpose)
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(messages) if text)
