"""What a report consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pfedmoe_mpi.report.drawing import Figure
from pfedmoe_mpi.report.tables import Table


@dataclass(frozen=True)
class Section:
    """A heading with a sentence, figures and tables below it."""

    title: str
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    text: str = ""


@dataclass(frozen=True)
class Report:
    """`facts` are the few numbers at the top, `notes` what a reader must know of them; `curves` of accuracy,
    (round, share) by name, are what a terminal shows.
    """

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    curves: Mapping[str, Sequence[tuple[float, float]]]
    notes: Sequence[str] = field(default=())

    @property
    def tables(self) -> list[Table]:
        return [table for section in self.sections for table in section.tables]

    @property
    def figures(self) -> list[Figure]:
        return [figure for section in self.sections for figure in section.figures]
