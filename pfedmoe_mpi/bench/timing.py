"""Two things timed side by side, and a line of the table that reports them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from pfedmoe_mpi.errors import StoppedError

if TYPE_CHECKING:
    from pfedmoe_mpi.federation.loop import Loop


REPEATS = 5


@dataclass(frozen=True)
class Line:
    """A row of the table. `aim` is the bound on `ratio`, from above or, with `at_least`, from below."""

    what: str
    ours: str
    reference: str = ""
    ratio: float | None = None
    aim: float | None = None
    at_least: bool = False

    def text(self) -> str:
        ratio = "" if self.ratio is None else f"{self.ratio:.3f}"
        if self.aim is None or self.ratio is None:
            return _columns(self.what, self.ours, self.reference, ratio, "")
        met = self.ratio >= self.aim if self.at_least else self.ratio <= self.aim
        sign, verdict = "≥" if self.at_least else "≤", "met" if met else "missed"
        return _columns(self.what, self.ours, self.reference, ratio, f"{sign} {self.aim:g} {verdict}")


def _columns(what: str, *cells: str) -> str:
    widths = (13, 13, 9, 16)
    return f"{what:52}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


HEADING = _columns("what", "ours", "reference", "ratio", "aim")


@dataclass(frozen=True)
class Pair:
    """Medians of two measured alternately, in seconds, and of their quotient."""

    ours: float
    reference: float
    ratio: float

    @classmethod
    def of(cls, taken: Sequence[tuple[float, float]]) -> Pair:
        return cls(median(a for a, _ in taken), median(b for _, b in taken), median(a / b for a, b in taken))

    def line(self, what: str, aim: float | None = None) -> Line:
        return Line(what, f"{self.ours:.4g} s", f"{self.reference:.4g} s", self.ratio, aim)

    def faster(self, what: str, aim: float | None = None) -> Line:
        """As a speed-up: how many times as fast as the reference."""
        return Line(what, f"{self.ours:.4g} s", f"{self.reference:.4g} s", 1 / self.ratio, aim, at_least=True)


def side_by_side(ours: Callable[[], float], reference: Callable[[], float], repeats: int = REPEATS) -> Pair:
    """Two functions that return seconds: once each to warm up, then by turns."""
    ours()
    reference()
    taken: list[tuple[float, float]] = []
    for number in range(repeats):
        if number % 2:
            second = reference()
            taken.append((ours(), second))
        else:
            taken.append((ours(), reference()))
    return Pair.of(taken)


def play(loop: Loop | None) -> None:
    """One round, on the ranks that have part in it."""
    if loop and not loop.run_round():
        raise StoppedError
