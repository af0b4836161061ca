"""A report: facts, notes, sections with figures and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pfedmoe_mpi.report.drawing import Figure
from pfedmoe_mpi.report.tables import Table


@dataclass(frozen=True)
class Section:
    """A heading; below it text, figures and tables."""

    title: str
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    text: str = ""


@dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
        facts: (name, value) of the few numbers at the top.
        curves: accuracy as (round, share) by name, for a terminal.
        notes: what a reader must know about the runs, below the facts.
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
