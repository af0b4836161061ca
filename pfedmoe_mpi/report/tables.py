"""Tables by content, and as CSV, LaTeX (booktabs) and plain text; the page has its own template."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BEST, SECOND = "best", "second"
SIGNS = {BEST: "**", SECOND: "__"}  # around a cell of plain text, as in Markdown
LATEX = {
    **{sign: "\\" + sign for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{
        "±": r"$\pm$",
        "−": "$-$",
        "α": r"$\alpha$",
        "–": "--",
        "…": r"\dots{}",
        "×": r"$\times$",
        "≥": r"$\ge$",
    },
}


@dataclass(frozen=True)
class Cell:
    """What is shown, the numbers behind it, and how it ranks in its column."""

    text: str
    values: tuple[Any, ...] = ()
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """A heading; `parts` name a cell's values in the CSV file, where shares are shares and not per cent.

    Words are set left, numbers right.
    """

    title: str
    parts: tuple[str, ...] = ("",)
    words: bool = False

    @property
    def names(self) -> list[str]:
        title = self.title.removesuffix(", %").removesuffix(", points")
        return [f"{title} {part}".rstrip() for part in self.parts]


@dataclass(frozen=True)
class Table:
    """`name` is the stem of its files; `open` that the page shows it without being asked."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    open: bool = True


def word(text: Any) -> Cell:
    """A cell of words."""
    return Cell(str(text), (text,))


def number(value: float | None, form: str = "{:.0f}") -> Cell:
    """A number as `form` shows it, a dash where there is none."""
    return Cell("–" if value is None else form.format(value), (value,))


def short(value: float) -> str:
    """Four digits, or all of the whole part; never an exponent for a large number."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def amount(value: float | None) -> Cell:
    """A number as `short` shows it, a dash where there is none."""
    return Cell("–" if value is None else short(value), (value,))


def percent(value: float | None) -> Cell:
    """A share in per cent with two decimals; the value stays a share."""
    return Cell("–" if value is None else f"{100 * value:.2f}", (value,))


def spread(mean: float | None, std: float | None, count: int, mark: str = "") -> Cell:
    """Shares as `mean ± std` in per cent; values are mean, std and how many."""
    if mean is None:
        return Cell("–", (None, None, count))
    shown = f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")
    return Cell(shown, (mean, std, count), mark)


SPREAD = ("mean", "std", "seeds")


def ranks(values: Sequence[float | None]) -> list[str]:
    """BEST for the highest, SECOND for the second highest value, equals alike; nothing for one alone."""
    levels = sorted({value for value in values if value is not None}, reverse=True)
    if sum(value is not None for value in values) < 2:
        return [""] * len(values)
    marks = dict(zip(levels, (BEST, SECOND), strict=False))
    return ["" if value is None else marks.get(value, "") for value in values]


def to_csv(table: Table) -> str:
    """Every number as it is, unrounded; one column per part."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([name for column in table.columns for name in column.names])
    for row in table.rows:
        padded = [
            (*cell.values, *[None] * (len(column.parts) - len(cell.values)))
            for cell, column in zip(row, table.columns, strict=True)
        ]
        writer.writerow(["" if value is None else value for values in padded for value in values])
    return out.getvalue()


def to_latex(table: Table) -> str:
    """A `tabular` for the booktabs package: best bold, second underlined."""
    places = "".join("l" if column.words else "r" for column in table.columns)
    lines = [f"% {line}" for line in (table.title, *table.notes)]
    lines += ["% \\usepackage{booktabs}", f"\\begin{{tabular}}{{{places}}}", "\\toprule"]
    lines.append(" & ".join(latex(column.title) for column in table.columns) + r" \\")
    lines.append("\\midrule")
    lines += [" & ".join(_latex_cell(cell) for cell in row) + r" \\" for row in table.rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _latex_cell(cell: Cell) -> str:
    wrap = {BEST: "\\textbf{%s}", SECOND: "\\underline{%s}"}.get(cell.mark, "%s")
    return wrap % latex(cell.text)


def latex(text: str) -> str:
    """Text with LaTeX's signs escaped."""
    return re.sub("|".join(map(re.escape, LATEX)), lambda found: LATEX[found[0]], text)


def to_text(table: Table, width: int = 0) -> str:
    """Aligned columns; `**best**`, `__second__`. What is wider than `width` characters, if given, goes on
    below, each part after the words that a row begins with.
    """
    body = [
        [SIGNS.get(cell.mark, "") + cell.text + SIGNS.get(cell.mark, "") for cell in row]
        for row in table.rows
    ]
    cells = [[column.title for column in table.columns], *body]
    widths = [max(len(row[at]) for row in cells) for at in range(len(table.columns))]

    def line(row: Sequence[str], part: Sequence[int]) -> str:
        shown = (row[n].ljust(widths[n]) if table.columns[n].words else row[n].rjust(widths[n]) for n in part)
        return "  ".join(shown).rstrip()

    lines = [table.title]
    for part in _parts(table.columns, widths, width):
        rule = "  ".join("-" * widths[n] for n in part)
        lines += ["", line(cells[0], part), rule, *(line(row, part) for row in body)]
    return "\n".join([*lines, *(f"({note})" for note in table.notes)])


def _parts(columns: Sequence[Column], widths: Sequence[int], width: int) -> list[list[int]]:
    """Columns that stand beside each other: the first words, and as many others as fit, at least one."""
    first = next((n for n, column in enumerate(columns) if n and not column.words), len(columns))
    parts = [list(range(first))]
    for n in range(first, len(columns)):
        wide = sum(widths[at] + 2 for at in parts[-1]) + widths[n]
        if width and wide > width and len(parts[-1]) > first:
            parts.append(list(range(first)))
        parts[-1].append(n)
    return parts
