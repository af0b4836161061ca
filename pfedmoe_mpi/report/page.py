"""One HTML file that needs nothing else: figures as SVG inside, no script, no request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pfedmoe_mpi.report import drawing
from pfedmoe_mpi.report.document import Report

NAME = "report.html"
MOST_CELLS = 20_000  # of a table on the page, which stays a few megabytes; its CSV file has them all
TEMPLATE = Path(__file__).with_name("page.html.j2")


def html(report: Report) -> str:
    """The page; figures are drawn here."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    rooms: Any = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    drawn = {figure.name: Markup(drawing.svg(figure)) for figure in report.figures}
    template = rooms.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return str(template.render(report=report, drawn=drawn, series=drawing.SERIES, most_cells=MOST_CELLS))
