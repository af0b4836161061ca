"""The README agrees with the program."""

from __future__ import annotations

import re

from pfedmoe_mpi import algorithms, cli, config
from support.paths import ROOT

README = (ROOT / "README.md").read_text()


def test_readme_lists_every_default() -> None:
    listed = re.findall(
        r"^\| `([\w.]+)` \| (.*?) \| .* \|$", README.partition("## Every default")[2], re.MULTILINE
    )
    shown = [(name, cli.shown(field.default)) for name, field in config.fields().items()]
    assert listed == shown


def test_readme_names_every_method_and_source() -> None:
    assert re.findall(
        r"^\| `(\w+)` \| .* \| .* \|$", README.partition("## Methods")[2].partition("## Data")[0], re.M
    )
    for name in algorithms.names():
        assert f"| `{name}` |" in README
    for source in config.choices(config.fields()["data.source"]):
        assert f"| `{source}` |" in README


def test_readme_lists_the_commands_of_the_help() -> None:
    for line in cli.USAGE.splitlines():
        if "python -m pfedmoe_mpi" in line and "bench" not in line:
            assert line.strip() in README
