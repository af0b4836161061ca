"""The settings as flags of a command: names, types, ranges, defaults and reasons, all from pydantic's fields.

argparse splits the command line, pydantic checks the values and reports all wrong ones together.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from pfedmoe_mpi.config import config, methods
from pfedmoe_mpi.errors import ConfigError

SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
KINDS = {int: "INT", float: "NUMBER", str: "NAME", bool: "true|false"}


def settings(algorithm: str = "") -> dict[str, FieldInfo]:
    """Return every setting that is a flag, by its dotted name; also those of a method's file."""
    every = config.fields(algorithm)
    return {name: field for name, field in every.items() if name not in config.BOOKKEEPING}


def method_file(words: Sequence[str]) -> str:
    """Return the file of the method that a command line, its configuration file or its run folder chooses,
    else nothing.
    """
    chosen = ""
    for word, value in zip_longest(words, words[1:], fillvalue=""):
        file = word if word.endswith(".toml") else os.path.join(word, "config.toml")
        if not word.startswith("-") and not chosen and os.path.isfile(file):
            with suppress(ConfigError):  # the command reads the file again and reports the error
                chosen = str(config.read_toml(Path(file)).get("algorithm", ""))
        if word.partition("=")[0] == "--algorithm":
            chosen = word.partition("=")[2] or value
    found: str = config.located({"algorithm": chosen}, Path.cwd())["algorithm"]
    return found if found.endswith(".py") else ""


def add_settings(parser: argparse.ArgumentParser, visible: bool, algorithm: str = "") -> None:
    """Add a flag for every setting, grouped by section; the help shows them if they are `visible`.

    Parsing gives their values as text, and only those of flags that were present.

    Args:
        algorithm: a method's file, whose settings are added.
    """
    every = settings(algorithm)
    of_methods = {*methods.names(), methods.name(algorithm)}
    for section, names in groupby(every, lambda name: name.rpartition(".")[0]):
        group = parser.add_argument_group(_title(section, of_methods))
        for name in names:
            field = every[name]
            bare: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
            group.add_argument(
                f"--{name}",
                dest=name,
                default=argparse.SUPPRESS,
                metavar=metavar(name, field),
                help=help_text(field) if visible else argparse.SUPPRESS,
                **bare,
            )


def _title(section: str, of_methods: Collection[str]) -> str:
    if section and section in of_methods:
        return f"{section} (only with --algorithm {section})"
    return section or "general"


def help_text(field: FieldInfo) -> str:
    """Return the setting's sentence with its default, range and the reason of the default, for argparse."""
    facts = ", ".join(filter(None, (f"default {shown(field.default)}", limits(field))))
    why = reason(field)
    return f"{sentence(field)} [{facts}{': ' if why else ''}{why}]".replace("%", "%%")


def sentence(field: FieldInfo) -> str:
    """Return what the setting is."""
    return " ".join((field.description or "").partition("Default: ")[0].split())


def reason(field: FieldInfo) -> str:
    """Return why the default is what it is, without the full stop; empty where the setting has no reason."""
    return " ".join((field.description or "").partition("Default: ")[2].split()).removesuffix(".")


def metavar(name: str, field: FieldInfo) -> str:
    """Return the setting's type in a word, or its choices."""
    if name in config.PATHS:
        return "PATH"
    words = config.choices(field)
    return "{" + ",".join(words) + "}" if words else _kind(field.annotation)


def _kind(kind: Any) -> str:
    if hasattr(kind, "__metadata__"):  # Annotated
        return _kind(kind.__origin__)
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"{_kind(get_args(kind)[0])},..."
    return KINDS.get(kind) or "|".join(_kind(part) for part in get_args(kind))


def limits(field: FieldInfo) -> str:
    """Return the setting's range, such as `> 0 and ≤ 1`."""
    parts = [item for part in get_args(field.annotation) for item in getattr(part, "__metadata__", ())]
    bounds = [
        f"{sign} {getattr(bound, name)}"
        for item in (*field.metadata, *parts)
        for bound in getattr(item, "metadata", [item])
        for name, sign in SIGNS.items()
        if hasattr(bound, name)
    ]
    return " and ".join(bounds)


def shown(value: Any) -> str:
    """Return a value as a user would write it."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value) or "none"
