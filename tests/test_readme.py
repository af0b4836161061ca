"""The README cannot drift from the program."""

from __future__ import annotations

import re

from pfedmoe_mpi import cli, config
from pfedmoe_mpi.config import methods
from support.paths import ROOT

README = (ROOT / "README.md").read_text()


def test_every_default_stands_in_the_table() -> None:
    listed = re.findall(
        r"^\| `([\w.]+)` \| (.*?) \| .* \|$", README.partition("## Every default")[2], re.MULTILINE
    )
    shown = [(name, cli.shown(field.default)) for name, field in config.fields().items()]
    assert listed == shown


def test_every_method_and_source_is_named() -> None:
    assert re.findall(
        r"^\| `(\w+)` \| .* \| .* \|$", README.partition("## Methods")[2].partition("## Data")[0], re.M
    )
    for name in methods.names():
        assert f"| `{name}` |" in README
    for source in config.choices(config.fields()["data.source"]):
        assert f"| `{source}` |" in README


def test_the_commands_of_the_help_are_those_of_the_readme() -> None:
    for line in cli.USAGE.splitlines():
        if "python -m pfedmoe_mpi" in line and "bench" not in line:
            assert line.strip() in README
