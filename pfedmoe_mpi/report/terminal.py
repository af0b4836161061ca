"""A report for a terminal: tables and a plot in plain characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pfedmoe_mpi.report.document import Report
from pfedmoe_mpi.report.tables import to_text

WIDTH, HEIGHT = 60, 12  # characters of the plot
SIGNS = "abcdefghijklmnopqrstuvwxyz"


def text(report: Report, width: int = 0) -> str:
    """Return a report as text without figures and folded tables, at most `width` wide (0: no limit)."""
    facts = [f"{name}: {value}" for name, value in report.facts]
    parts = [
        f"{report.title}\n{report.subtitle}",
        "\n".join(facts),
        *(f"note: {note}" for note in report.notes),
    ]
    parts.append(curve(report.curves))
    for section in report.sections:
        parts += [section.text] if section.text else []
        parts += [to_text(table, width) for table in section.tables if table.open and table.rows]
    return "\n\n".join(filter(None, parts))


def curve(series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Plot accuracy in % over rounds, a letter per series; where series overlap, the first is visible."""
    points = [point for values in series.values() for point in values]
    if not points:
        return ""
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = (100 * end(y for _, y in points) for end in (min, max))
    high = high if high > low else low + 1
    field = [[" "] * WIDTH for _ in range(HEIGHT)]
    for sign, values in reversed(list(zip(_signs(len(series)), series.values(), strict=True))):
        for x, y in values:
            column = round((x - first) / max(last - first, 1) * (WIDTH - 1))
            field[round((high - 100 * y) / (high - low) * (HEIGHT - 1))][column] = sign
    marks = {0: high, HEIGHT - 1: low}
    lines = [f"{marks[n]:6.2f} |" if n in marks else "       |" for n in range(HEIGHT)]
    lines = [(mark + "".join(row)).rstrip() for mark, row in zip(lines, field, strict=True)]
    below = f"{first:g}".ljust(WIDTH - len(f"{last:g}")) + f"{last:g}"
    legend = [f"  {sign}  {name}" for sign, name in zip(_signs(len(series)), series, strict=True)]
    return "\n".join(["accuracy, %, by round", *lines, "       +" + "-" * WIDTH, " " * 8 + below, *legend])


def _signs(number: int) -> str:
    return (SIGNS * (number // len(SIGNS) + 1))[:number]
