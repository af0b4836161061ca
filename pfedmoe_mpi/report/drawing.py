"""Figures with matplotlib: as PNG and PDF for a paper, as SVG whose colours follow the page.

Nothing is told by colour alone: every series has its own line and marker too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, told apart by colour-blind readers; pale ones darkened to contrast 3 on white.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#c26f9b", "#b87f00", "#2f97d6", "#666666")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH = 6.4  # inches; two columns of a paper
MAP = "cividis"  # the same to colour-blind readers, and ordered in grey


@dataclass(frozen=True)
class Paint:
    """The colours of text, of what is behind it, of helping lines and of the series."""

    ink: str
    paper: str
    grid: str
    series: tuple[str, ...]


PAPER = Paint("#1a1a1a", "#ffffff", "#cccccc", SERIES)
# Stands for the page's variables: a colour that no figure uses otherwise becomes `var(--name)`.
NAMED = {"#010203": "--ink", "#010204": "--paper", "#010205": "--grid"} | {
    f"#02030{n}": f"--series-{n}" for n in range(len(SERIES))
}
THEMED = Paint("#010203", "#010204", "#010205", tuple(f"#02030{n}" for n in range(len(SERIES))))


@dataclass(frozen=True)
class Style:
    """How one series looks."""

    number: int
    color: str
    linestyle: Any
    marker: str

    def line(self, points: int) -> dict[str, Any]:
        """For `Axes.plot`: about six markers along the line; those of equal lines stand side by side."""
        every = max(1, (points + 5) // 6)
        return {
            **{"color": self.color, "linestyle": self.linestyle, "marker": self.marker},
            **{"markevery": (self.number % every, every), "markersize": 4.5, "linewidth": 1.5},
        }

    def dots(self) -> dict[str, Any]:
        """For `Axes.plot`: markers alone."""
        return {"color": self.color, "linestyle": "none", "marker": self.marker, "markersize": 5}


def style(number: int, paint: Paint) -> Style:
    """The look of series `number`; the first 35 differ, in line or marker and mostly in colour."""
    return Style(
        number, paint.series[number % len(SERIES)], LINES[number % len(LINES)], MARKERS[number % len(MARKERS)]
    )


@dataclass(frozen=True)
class Figure:
    """`draw(figure, paint)` fills a matplotlib figure of `size` inches; `caption` says what it shows."""

    name: str
    title: str
    caption: str
    draw: Callable[[Any, Paint], None]
    size: tuple[float, float] = (WIDTH, 3.2)


def _drawn(figure: Figure, paint: Paint) -> Any:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=figure.size, layout="constrained")
    figure.draw(canvas, paint)
    return canvas


def _look(paint: Paint) -> Any:
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
    """An `<svg>` element for the page, in the colours of its variables; equal figures give equal text."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(_look(THEMED)):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        _drawn(figure, THEMED).savefig(out, format="svg", metadata=metadata)
    text = out.getvalue()
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    for color, name in NAMED.items():
        text = text.replace(color, f"var({name})")
    # Ids are unique within the page, where several figures stand.
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{figure.name}-", text)
    label = figure.title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def save(figure: Figure, folder: Path) -> None:
    """NAME.png at 300 dpi and NAME.pdf, on white; equal figures give equal files."""
    import matplotlib

    with matplotlib.rc_context({**_look(PAPER), "savefig.facecolor": "white"}):
        canvas = _drawn(figure, PAPER)
        canvas.savefig(folder / f"{figure.name}.png", dpi=300, metadata={"Software": None})
        canvas.savefig(folder / f"{figure.name}.pdf", metadata={"CreationDate": None})
