"""The READMEs and the program say the same."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pfedmoe_mpi import arguments, config
from support import launcher
from support.paths import ROOT

PACKAGE = ROOT / "pfedmoe_mpi"
README, METHODS = ROOT / "README.md", PACKAGE / "algorithms" / "README.md"
PAGES = [
    README,
    *sorted(path for part in ("jobs", "pfedmoe_mpi", "tests") for path in (ROOT / part).rglob("*.md")),
]
UNKNOWN = "--no.such.setting"  # appended to a command line, it must be the only flag that is refused
COMMANDS = {name.partition(" ")[0] for name in arguments.COMMANDS}
# For what a page leaves open.
EXAMPLES = {"X": "fedavg", "S": "0", "N": "80", "WHAT": "round", "COMMAND": "run"}


@cache
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_blocks(markdown: str) -> str:
    return re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def rows(page: Path, heading: str) -> list[list[str]]:
    """Return the cells of the table whose first column has this heading."""
    table = re.search(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text(page), re.M)
    assert table, f"{page} has no table of {heading}"
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[1].splitlines()]


def names(page: Path, heading: str) -> list[str]:
    return [cells[0].strip("` ") for cells in rows(page, heading)]


def test_readme_is_short() -> None:
    assert len(README.read_bytes()) <= 12_000


# Methods, their options and data sources


def shipped() -> set[str]:
    """Return the methods that git tracks: a user's own file need not be documented."""
    listed = subprocess.run(
        ["git", "ls-files", "pfedmoe_mpi/algorithms"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [Path(line) for line in listed.stdout.splitlines()]
    files = {path.stem for path in paths if path.suffix == ".py" and path.parent.name == "algorithms"}
    packages = {path.parent.name for path in paths if path.name == "__init__.py"} - {"algorithms"}
    return {name for name in files | packages if name != "base" and not name.startswith("_")}


def test_methods_are_those_shipped() -> None:
    listed = names(METHODS, "`--algorithm`")
    assert len(listed) == len(set(listed)) and set(listed) == shipped()
    assert f"{len(listed)} methods" in text(README)


def test_options_of_methods_have_the_code_s_defaults() -> None:
    documented = set(names(METHODS, "`--algorithm`"))
    code = {name: default(field.default) for name, field in config.fields().items()}
    expected = [pair for pair in code.items() if pair[0].partition(".")[0] in documented and "." in pair[0]]
    listed = rows(METHODS, "setting")
    assert [(name.strip("`"), value) for name, value, _ in listed] == expected
    assert all(reason for _, _, reason in listed)


def default(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) or "none"


def test_data_sources_are_those_of_the_setting() -> None:
    listed = names(PACKAGE / "data" / "README.md", "`--data.source`")
    choices = config.choices(config.fields()["data.source"])
    assert sorted(listed) == sorted([*choices, "FILE.py:NAME"])


# Links


def anchors(page: Path) -> set[str]:
    """Return the headings of a page as they are linked to."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(text(page)), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_resolve(page: Path) -> None:
    prose = re.sub(r"^    .*$", "", without_blocks(text(page)), flags=re.M)
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{link} is not there"
        assert not anchor or anchor in anchors(target), f"{link} is not a heading"


# Command lines


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of every `python -m pfedmoe_mpi` that a page prints, usage lines included."""
    whole = re.sub(r"\\?\n {8,}", " ", text(page))
    blocks = re.findall(r"^(?:    |\$ )(.*)$", whole, re.M)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_blocks(whole))]
    for line in (*blocks, *spans):
        found = re.fullmatch(r"(?:.* && )?(?:mpirun .*)?python -m pfedmoe_mpi\b ?(.*)", line)
        if found:
            given = re.sub(r"[\[\]]|\|\S+| \.\.\.|--section\.field VALUE", "", found[1])
            yield [EXAMPLES.get(word, word) for word in shlex.split(given)]


@pytest.mark.parametrize(
    ("page", "words"),
    [
        pytest.param(page, line, id=f"{relative(page)}: {' '.join(line)}")
        for page in PAGES
        for line in commands(page)
    ],
)
def test_command_line_is_accepted(
    page: Path, words: list[str], session: launcher.Session, tmp_path: Path
) -> None:
    command = words[0] if words and not words[0].startswith("-") else "run"
    assert command in COMMANDS or command.endswith(".toml")
    if command in {"translate", "help"} or "--help" in words:
        assert session(*words, cwd=tmp_path).code == 0
        return
    result = session(*words, UNKNOWN, cwd=tmp_path)
    message = result.err.partition("error: ")[2].partition("remedy: ")[0]
    assert result.code == 2 and re.findall(r"--[\w.-]+", message) == [UNKNOWN], result.err


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_settings_named_exist(page: Path) -> None:
    named = set(re.findall(r"--(\w+\.\w+)", text(page))) - {"section.field"}
    assert named <= set(config.fields())


def test_every_command_has_a_usage_line() -> None:
    usage = re.findall(
        r"^    (?:mpirun -n 4 )?python -m pfedmoe_mpi \[?(\w+)",
        text(PACKAGE / "commands" / "README.md"),
        re.M,
    )
    assert set(usage) == COMMANDS
