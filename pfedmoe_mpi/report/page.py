"""The report as one self-contained HTML file: figures as inline SVG, no script, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pfedmoe_mpi.report import drawing
from pfedmoe_mpi.report.document import Report

NAME = "report.html"
MOST_CELLS = 20_000  # of a table on the page, to keep it to a few megabytes; the CSV file has all
TEMPLATE = Path(__file__).with_name("page.html.j2")


def html(report: Report) -> str:
    """Draw the figures and return the page."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment: Any = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    drawings = {
        figure.name: (Markup(drawing.svg(figure)), Markup(drawing.svg(figure.narrow)))
        for figure in report.figures
    }
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return str(
        template.render(report=report, drawings=drawings, series=drawing.SERIES, most_cells=MOST_CELLS)
    )
