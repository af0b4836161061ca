"""The errors a user may see, and the program's exit codes.

A `UserError` has one message with its remedy. It is raised before the first round, printed once by one rank,
and ends the program with exit code 2; nothing was written. A `RunError` ends a run later.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_USER = 2
EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: stopped with a checkpoint, submit again

Error = TypeVar("Error", bound="CodeError")


class MessageError(Exception):
    """One message with its remedy, printed once by one rank, without a traceback."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}\n  remedy: {remedy}" if remedy else problem)
        self.problem = problem
        self.remedy = remedy


class UserError(MessageError):
    """Something the user can fix before the first round; exit code 2."""


class RunError(MessageError):
    """A run that cannot continue, raised on all ranks alike; what it wrote stays; exit code 1."""


class DivergedError(RunError):
    """A run whose clients or server are not finite any more, which would happen again."""


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, out of range, or contradicts another."""


class CodeError(ConfigError):
    """A file of code that cannot be used; the message names the file and the line."""

    REMEDY = "correct this file"

    # Not __init__: ranks send each other errors, and unpickling calls __init__ with the message alone.
    @classmethod
    def at(cls: type[Error], path: Path, line: int | None, reason: object) -> Error:
        """Return the error about one line of a file, or about the whole file."""
        place = f"{path}:{line}" if line else str(path)
        first = str(reason).strip().partition("\n")[0].rstrip(":")
        return cls(f"{place}: {first}", cls.REMEDY)

    @classmethod
    def of(cls: type[Error], path: Path, error: BaseException) -> Error:
        """Return the error about an exception that code of this file raised, with the last line it passed."""
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return cls.at(path, last_line(error, path), reason)


def last_line(error: BaseException, path: Path) -> int | None:
    """Return the last line of a file that an error passed through."""
    if isinstance(error, SyntaxError):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)


class DataError(UserError):
    """Data that are missing, unreadable or of an unusable shape."""


class PartitionError(UserError):
    """A partition that no draw can satisfy with these numbers."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, unfinished or of another format version."""


class LaunchError(UserError):
    """A launcher that does not match the MPI library."""


class StoppedError(Exception):
    """A stop was requested: abandon the work in progress, which is repeated after the restart."""


def close_matches(word: str, words: Iterable[str]) -> list[str]:
    """Return the `words` that `word` is the last part of, else the one of nearest spelling, if any."""
    from difflib import get_close_matches  # only needed for errors

    candidates = {candidate.lower(): candidate for candidate in words}
    word = word.lower()
    same = [candidate for name, candidate in candidates.items() if name.rpartition(".")[2] == word]
    return same or [candidates[name] for name in get_close_matches(word, list(candidates), n=1, cutoff=0.5)]


def nearest(word: str, words: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest of `words`, or nothing."""
    return did_you_mean([f"'{match}'" for match in close_matches(word, words)])


def did_you_mean(names: Sequence[str]) -> str:
    """Return `; did you mean x or y?`, or nothing without names."""
    return f"; did you mean {either(names)}?" if names else ""


def either(names: Sequence[str]) -> str:
    """Return `x, y or z`."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
