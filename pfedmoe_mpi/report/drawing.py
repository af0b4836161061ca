"""Figures with matplotlib: PNG and PDF for a paper, SVG for the page, whose colours follow the page.

Every figure is drawn for two widths, that of a paper and that of a phone, where its panels are stacked.
Series differ in line or marker too, never in colour alone.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, distinguishable by colour-blind readers; pale ones darkened to contrast 3 on white.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#c26f9b", "#b87f00", "#2f97d6", "#666666")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH = 6.4  # inches; two columns of a paper
NARROW = 3.75  # inches; 360 CSS pixels, the text width of a phone
LEGEND_CHARACTERS = 17  # in an inch of a legend
LEGEND_SIGN = 9  # characters that the sign of a series takes, with its spaces
COLOR_MAP = "cividis"  # the same for colour-blind readers; ordered in greyscale too


@dataclass(frozen=True)
class Paint:
    """Colours of text, background, grid lines and series."""

    ink: str
    paper: str
    grid: str
    series: tuple[str, ...]


PAPER = Paint("#1a1a1a", "#ffffff", "#cccccc", SERIES)
# Placeholder colours that no figure uses otherwise; `svg` replaces each by a CSS variable of the page.
PLACEHOLDERS = {"#010203": "--ink", "#010204": "--paper", "#010205": "--grid"} | {
    f"#02030{n}": f"--series-{n}" for n in range(len(SERIES))
}
THEMED = Paint("#010203", "#010204", "#010205", tuple(f"#02030{n}" for n in range(len(SERIES))))


@dataclass(frozen=True)
class Style:
    """Colour, line and marker of one series."""

    number: int
    color: str
    linestyle: Any
    marker: str

    def line(self, points: int) -> dict[str, Any]:
        """Return arguments of `Axes.plot` for a line with about six markers, shifted by series."""
        every = max(1, (points + 5) // 6)
        return {
            **{"color": self.color, "linestyle": self.linestyle, "marker": self.marker},
            **{"markevery": (self.number % every, every), "markersize": 4.5, "linewidth": 1.5},
        }

    def dots(self) -> dict[str, Any]:
        """Return arguments of `Axes.plot` for markers without a line."""
        return {"color": self.color, "linestyle": "none", "marker": self.marker, "markersize": 5}


def style(number: int, paint: Paint) -> Style:
    """Return the style of series `number`; the first 35 differ in line or marker, and most in colour."""
    return Style(
        number, paint.series[number % len(SERIES)], LINES[number % len(LINES)], MARKERS[number % len(MARKERS)]
    )


@dataclass(frozen=True)
class Figure:
    """A figure with its caption; `draw(canvas, paint)` fills a matplotlib figure of `size` inches.

    `panels` is the number of panels side by side, which a narrow figure stacks.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Any, Paint], None]
    size: tuple[float, float] = (WIDTH, 3.2)
    panels: int = 1

    @property
    def narrow(self) -> Figure:
        """The figure for a phone; its name is one of its own, because ids are unique within a page."""
        height = self.size[1] * (1 + 0.8 * (self.panels - 1))
        return replace(self, name=f"{self.name}-narrow", size=(NARROW, height))


def panels(canvas: Any, ratios: Sequence[float], **sharing: Any) -> list[Any]:
    """Return panels side by side with these ratios of widths, stacked on a narrow canvas."""
    if is_narrow(canvas):
        grid = canvas.subplots(len(ratios), 1, squeeze=False, **sharing)
    else:
        grid = canvas.subplots(1, len(ratios), width_ratios=ratios, squeeze=False, **sharing)
    return list(grid.flat)


def is_narrow(canvas: Any) -> bool:
    return bool(canvas.get_figwidth() < WIDTH)


def legend_above(canvas: Any, axes: Any, columns: int = 3) -> None:
    """Put a legend above the figure, where it covers no line: as many columns as fit, at most `columns`."""
    handles, labels = axes.get_legend_handles_labels()
    room = int(LEGEND_CHARACTERS * canvas.get_figwidth())
    columns = next(n for n in range(columns, 0, -1) if n == 1 or _legend_width(labels, n) <= room)
    wrapped = [textwrap.fill(label, room - LEGEND_SIGN) for label in labels]
    canvas.legend(
        handles, wrapped, loc="outside upper left", ncols=columns, handlelength=2.8, columnspacing=1.2
    )


def _legend_width(labels: Sequence[str], columns: int) -> int:
    """Return the width in characters; matplotlib fills column by column, the first ones with one more."""
    rows, longer = divmod(len(labels), columns)
    ends = [number * rows + min(number, longer) for number in range(columns + 1)]
    parts = [labels[start:end] for start, end in pairwise(ends) if end > start]
    return sum(max(map(len, part)) + LEGEND_SIGN for part in parts)


def _draw(figure: Figure, paint: Paint) -> Any:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=figure.size, layout="constrained")
    figure.draw(canvas, paint)
    return canvas


def _settings(paint: Paint) -> Any:
    """Return matplotlib's settings in the colours of `paint`."""
    ink = (
        "text.color",
        "axes.labelcolor",
        "axes.edgecolor",
        "xtick.color",
        "ytick.color",
        "legend.labelcolor",
    )
    return {
        **dict.fromkeys(ink, paint.ink),
        **{"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none"},
        **{"font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8},
        **{"axes.grid": True, "grid.color": paint.grid, "grid.linewidth": 0.6, "axes.axisbelow": True},
        **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
        **{
            "pdf.fonttype": 42,
            "svg.hashsalt": "report",
            "text.parse_math": False,
            "hatch.color": paint.ink,
            "axes.formatter.useoffset": False,
        },
    }


def svg(figure: Figure) -> str:
    """Return an `<svg>` element in the colours of the page's variables; equal figures give equal text."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(_settings(THEMED)):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        _draw(figure, THEMED).savefig(out, format="svg", metadata=metadata)
    text = out.getvalue()
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    for color, name in PLACEHOLDERS.items():
        text = text.replace(color, f"var({name})")
    # A page has several figures, and ids must be unique within it.
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{figure.name}-", text)
    label = figure.title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def save(figure: Figure, folder: Path) -> None:
    """Write NAME.png at 300 dpi and NAME.pdf, on white; equal figures give equal files."""
    import matplotlib

    with matplotlib.rc_context({**_settings(PAPER), "savefig.facecolor": "white"}):
        canvas = _draw(figure, PAPER)
        canvas.savefig(folder / f"{figure.name}.png", dpi=300, metadata={"Software": None})
        canvas.savefig(folder / f"{figure.name}.pdf", metadata={"CreationDate": None})


def save_as(figure: Figure, path: Path) -> None:
    """Write a figure, on white, in the format of the file's name."""
    import matplotlib

    with matplotlib.rc_context({**_settings(PAPER), "savefig.facecolor": "white"}):
        _draw(figure, PAPER).savefig(path, dpi=300)
