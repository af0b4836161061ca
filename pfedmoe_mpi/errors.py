"""What a user can do wrong, and how the program ends.

A `UserError` carries one message with its remedy. It is found before the first round, printed once by one
rank, and ends the program with exit code 2; nothing was written. A `RunError` ends a run later on.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_USER = 2
EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: stopped with a checkpoint, submit again


class MessageError(Exception):
    """One message with its remedy, printed once by one rank, without a traceback."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}\n  remedy: {remedy}" if remedy else problem)
        self.problem = problem
        self.remedy = remedy


class UserError(MessageError):
    """Something the user can mend before the first round; exit code 2."""


class RunError(MessageError):
    """A run that cannot go on, met by all ranks alike; what it wrote stands; exit code 1."""


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, out of range, or contradicts another."""


class DataError(UserError):
    """Data that are missing, unreadable or of an unusable shape."""


class PartitionError(UserError):
    """A partition that cannot be met with these numbers."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, unfinished or of another format version."""


class LaunchError(UserError):
    """A launcher that does not match the MPI library."""


class StoppedError(Exception):
    """A stop was asked for: leave the work in hand, it is done again after the restart."""


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `words`, or nothing."""
    known = {candidate.lower(): candidate for candidate in words}
    same = [candidate for name, candidate in known.items() if name.rpartition(".")[2] == word.lower()]
    if same:
        return f"; did you mean {' or '.join(repr(candidate) for candidate in same)}?"
    match = get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean '{known[match[0]]}'?" if match else ""
