"""Times measured side by side, and the lines of the table that reports them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from pfedmoe_mpi.errors import StoppedError

if TYPE_CHECKING:
    from pfedmoe_mpi.federation.loop import Loop


REPEATS, QUICK_REPEATS = 5, 3


@dataclass(frozen=True)
class Line:
    """A row of the table; `aim` bounds `ratio` from above or, with `at_least`, from below."""

    what: str
    ours: str
    reference: str = ""
    ratio: float | None = None
    aim: float | None = None
    at_least: bool = False

    def text(self) -> str:
        """Return the row with aligned columns."""
        ratio = "" if self.ratio is None else f"{self.ratio:.3f}"
        if self.aim is None or self.ratio is None:
            return _columns(self.what, self.ours, self.reference, ratio, "")
        reached = self.ratio >= self.aim if self.at_least else self.ratio <= self.aim
        sign, verdict = "≥" if self.at_least else "≤", "met" if reached else "missed"
        return _columns(self.what, self.ours, self.reference, ratio, f"{sign} {self.aim:g} {verdict}")


def _columns(what: str, *cells: str) -> str:
    widths = (13, 13, 9, 16)
    return f"{what:52}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


HEADING = _columns("what", "ours", "reference", "ratio", "aim")


@dataclass(frozen=True)
class Pair:
    """Medians of two alternately measured times, in seconds, and of their ratio."""

    ours: float
    reference: float
    ratio: float

    @classmethod
    def of(cls, times: Sequence[tuple[float, float]]) -> Pair:
        """Return the medians of measured pairs (ours, reference)."""
        return cls(median(a for a, _ in times), median(b for _, b in times), median(a / b for a, b in times))

    def line(self, what: str, aim: float | None = None) -> Line:
        """Return a row with the ratio of our time to the reference's."""
        return Line(what, f"{self.ours:.4g} s", f"{self.reference:.4g} s", self.ratio, aim)

    def faster(self, what: str, aim: float | None = None) -> Line:
        """Return a row with the speed-up over the reference."""
        return Line(what, f"{self.ours:.4g} s", f"{self.reference:.4g} s", 1 / self.ratio, aim, at_least=True)


def side_by_side(
    ours: Callable[[], float],
    reference: Callable[[], float],
    repeats: int = REPEATS,
    pair_done: Callable[[int, int], None] = lambda done, pairs: None,
) -> Pair:
    """Call two functions that return seconds: once to warm up, then alternately in alternating order.

    `pair_done` is called after every pair with the number of pairs done and of all, the first one included.
    """
    ours()
    reference()
    pair_done(1, 1 + repeats)
    times: list[tuple[float, float]] = []
    for number in range(repeats):
        if number % 2:
            second = reference()
            times.append((ours(), second))
        else:
            times.append((ours(), reference()))
        pair_done(2 + number, 1 + repeats)
    return Pair.of(times)


def run_round(loop: Loop | None) -> None:
    """Run one round on the ranks that have a loop.

    Raises:
        StoppedError: a stop was requested.
    """
    if loop and not loop.run_round():
        raise StoppedError
