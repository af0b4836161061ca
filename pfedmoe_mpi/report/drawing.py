"""Figures with matplotlib: PNG and PDF for a paper, SVG whose colours follow the page.

Series differ in line or marker too, never in colour alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, distinguishable by colour-blind readers; pale ones darkened to contrast 3 on white.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#c26f9b", "#b87f00", "#2f97d6", "#666666")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH = 6.4  # inches; two columns of a paper
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
    """A figure with its caption; `draw(canvas, paint)` fills a matplotlib figure of `size` inches."""

    name: str
    title: str
    caption: str
    draw: Callable[[Any, Paint], None]
    size: tuple[float, float] = (WIDTH, 3.2)


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
