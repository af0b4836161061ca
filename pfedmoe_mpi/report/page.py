"""The report as one self-contained HTML file: figures as inline SVG, no network.

A long table of clients is searched by an inline script, the only one, which the page's policy names by its
hash. Without scripts the page shows the table's first rows.
"""

from __future__ import annotations

import base64
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from pfedmoe_mpi.report import drawing
from pfedmoe_mpi.report.document import Report
from pfedmoe_mpi.report.tables import Table

NAME = "report.html"
MOST_CELLS = 20_000  # of a table on the page, to keep it to a few megabytes; the CSV file has all
MOST_SEARCHED = 300_000  # cells of a table that is searched: about two megabytes of text
FIRST = 40  # rows of a table that is searched
TEMPLATE, SCRIPT = (Path(__file__).with_name(name) for name in ("page.html.j2", "search.js"))


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
    searched = {table.name: Markup(_rows(table)) for table in report.tables if _is_searched(table)}
    script = SCRIPT.read_text(encoding="utf-8") if searched else ""
    return str(
        template.render(
            report=report,
            drawings=drawings,
            series=drawing.SERIES,
            most_cells=MOST_CELLS,
            searched=searched,
            first=FIRST,
            script=Markup(script),
            script_hash=base64.b64encode(sha256(script.encode()).digest()).decode(),
        )
    )


def _is_searched(table: Table) -> bool:
    """Return whether a table has too many rows to be read, and few enough to be searched on the page."""
    return bool(table.searched) and FIRST < len(table.rows) <= MOST_SEARCHED // len(table.columns)


def _rows(table: Table) -> str:
    """Return the texts of all cells as JSON that is safe inside an HTML element."""
    return json.dumps([[cell.text for cell in row] for row in table.rows]).replace("<", "\\u003c")
