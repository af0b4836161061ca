"""Class names that a person would read as one class, or as none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from unicodedata import normalize

_MISSING = {"nan", "na", "n/a", "null"}  # as other programs write a value that is missing


def name_warnings(names: Iterable[str], where: str) -> Iterator[str]:
    """Yield a warning for names that differ in case, spaces or leading zeros only, or stand for nothing."""
    met: dict[str, str] = {}
    names = tuple(names)
    for name in names:
        key = _key(name)
        if met.setdefault(key, name) != name:
            yield f"{where}: '{met[key]}' and '{name}' are two classes; write them alike if they are one"
        if key in _MISSING or (key == "-1" and len(names) > 2):
            yield f"{where}: '{name}' is a class; remove its rows if it stands for a missing label"


def _key(name: str) -> str:
    """Return what is equal for names that a person would read as one."""
    plain = " ".join(normalize("NFKC", name).casefold().split())
    return plain.lstrip("0") if plain.isdecimal() else plain
