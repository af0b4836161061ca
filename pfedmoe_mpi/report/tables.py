"""Tables, and their output as CSV, LaTeX (booktabs) and plain text; the page has its own template."""

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
        "δ": r"$\delta$",
        "ε": r"$\varepsilon$",
        "–": "--",
        "…": r"\dots{}",
        "×": r"$\times$",
        "≥": r"$\ge$",
    },
}


@dataclass(frozen=True)
class Cell:
    """The text of a cell, the values behind it, and its rank in the column."""

    text: str
    values: tuple[Any, ...] = ()
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        parts: names of a cell's values in the CSV file, where shares are from 0 to 1, not per cent.
        words: whether cells are words, aligned left; numbers are aligned right.
    """

    title: str
    parts: tuple[str, ...] = ("",)
    words: bool = False

    @property
    def names(self) -> list[str]:
        """The headings of the parts in the CSV file."""
        title = self.title.removesuffix(", %").removesuffix(", points")
        return [f"{title} {part}".rstrip() for part in self.parts]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: the stem of its files.
        open: whether the page shows it unfolded.
        searched: how many of the first columns a reader of a long table may search; 0: it is not searched.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    open: bool = True
    searched: int = 0


def word(text: Any) -> Cell:
    """Return a cell of words."""
    return Cell(str(text), (text,))


def number(value: float | None, form: str = "{:.0f}") -> Cell:
    """Return a cell with a number formatted by `form`, a dash for None."""
    return Cell("–" if value is None else form.format(value), (value,))


def short(value: float) -> str:
    """Return a number with four digits, or its whole part from 1000 on; large ones without an exponent."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def amount(value: float | None) -> Cell:
    """Return a cell with a number formatted by `short`, a dash for None."""
    return Cell("–" if value is None else short(value), (value,))


def percent(value: float | None) -> Cell:
    """Return a cell with a share in per cent with two decimals; its value stays a share."""
    return Cell("–" if value is None else f"{100 * value:.2f}", (value,))


def points(share: float) -> str:
    """Return a difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.2f}".replace("-", "−")


def difference(value: float | None) -> Cell:
    """Return a cell with a difference of shares in percentage points; its value stays a share."""
    return Cell("–" if value is None else points(value), (value,))


def interval(low: float | None, high: float | None) -> Cell:
    """Return a cell with an interval of shares in percentage points, a dash without one."""
    return Cell("–" if low is None or high is None else f"{points(low)} to {points(high)}", (low, high))


def spread(mean: float | None, std: float | None, count: int, mark: str = "") -> Cell:
    """Return a cell with `mean ± std` of shares in per cent; its values are mean, std and count."""
    if mean is None:
        return Cell("–", (None, None, count))
    text = f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")
    return Cell(text, (mean, std, count), mark)


SPREAD = ("mean", "std", "seeds")


def client_columns(names: Sequence[str]) -> list[Column]:
    """Return the columns that say which client a row is about: its number, and its name if it has one."""
    return [Column("client"), *([Column("name", words=True)] if names else [])]


def client_cells(client: int, names: Sequence[str]) -> list[Cell]:
    """Return the cells of `client_columns`."""
    return [number(client), *([word(names[client])] if names else [])]


def ranks(values: Sequence[float | None]) -> list[str]:
    """Return BEST for the highest value, SECOND for the next; ties share a mark, a single value has none."""
    levels = sorted({value for value in values if value is not None}, reverse=True)
    if sum(value is not None for value in values) < 2:
        return [""] * len(values)
    marks = dict(zip(levels, (BEST, SECOND), strict=False))
    return ["" if value is None else marks.get(value, "") for value in values]


def to_csv(table: Table) -> str:
    """Return a table as CSV: numbers unrounded, one column per part."""
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
    """Return a `tabular` for the booktabs package: best in bold, second best underlined."""
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
    """Return text with LaTeX's special characters escaped."""
    return re.sub("|".join(map(re.escape, LATEX)), lambda match: LATEX[match[0]], text)


def to_text(table: Table, width: int = 0) -> str:
    """Return a table with aligned columns, `**best**` and `__second__`.

    A table wider than `width` characters (0: no limit) is split into parts below each other; each part
    repeats the words at the start of the rows.
    """
    body = [
        [SIGNS.get(cell.mark, "") + cell.text + SIGNS.get(cell.mark, "") for cell in row]
        for row in table.rows
    ]
    cells = [[column.title for column in table.columns], *body]
    widths = [max(len(row[n]) for row in cells) for n in range(len(table.columns))]

    def line(row: Sequence[str], part: Sequence[int]) -> str:
        padded = (
            row[n].ljust(widths[n]) if table.columns[n].words else row[n].rjust(widths[n]) for n in part
        )
        return "  ".join(padded).rstrip()

    lines = [table.title]
    for part in _parts(table.columns, widths, width):
        rule = "  ".join("-" * widths[n] for n in part)
        lines += ["", line(cells[0], part), rule, *(line(row, part) for row in body)]
    return "\n".join([*lines, *(f"({note})" for note in table.notes)])


def _parts(columns: Sequence[Column], widths: Sequence[int], width: int) -> list[list[int]]:
    """Return the columns of each part: the leading words, and as many others as fit, at least one."""
    first = next((n for n, column in enumerate(columns) if n and not column.words), len(columns))
    parts = [list(range(first))]
    for n in range(first, len(columns)):
        part_width = sum(widths[column] + 2 for column in parts[-1]) + widths[n]
        if width and part_width > width and len(parts[-1]) > first:
            parts.append(list(range(first)))
        parts[-1].append(n)
    return parts
