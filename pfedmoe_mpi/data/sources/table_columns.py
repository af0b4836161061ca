"""Which column of a table is what: label, client, part, image, text or feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.errors import DataError, nearest

_SHOWN = 20  # column names in a message
_COLUMNS = 1 << 16
_INDEX = ("", "__index_level_0__")  # how pandas names its row numbers in CSV and in Parquet
_FIRST_LINE = "rename one of them in the first line"


@dataclass(frozen=True)
class Columns:
    """The names of columns by what they are; `left_out` has the reason of every other one."""

    label: str
    client: str
    split: str
    image: str
    text: Sequence[str]
    features: Sequence[str]
    left_out: Mapping[str, str]

    @property
    def read(self) -> list[str]:
        """Every column that is read, once."""
        named = [self.label, self.client, self.split, self.image, *self.text, *self.features]
        return [name for name in named if name]


def choose_columns(path: str, header: Sequence[str], settings: Data, declared: Mapping[str, Any]) -> Columns:
    """Return what every column of the table is.

    Args:
        declared: what Hugging Face's library notes of the columns; for data.label and data.image.

    Raises:
        DataError: a setting names no column, two settings name one, two columns have one name, no label, or
            no feature.
    """
    listed = ", ".join(header[:_SHOWN]) + (", …" if len(header) > _SHOWN else "")
    if len(header) > _COLUMNS:
        raise DataError(f"{path} has {len(header):,} columns, more than {_COLUMNS:,}", "keep those you need")
    twice = next((name for place, name in enumerate(header) if name in header[:place]), None)
    if twice is not None:
        raise DataError(f"{path} has two columns named '{twice}'", _FIRST_LINE)
    label = settings.label or _declared(header, declared, "ClassLabel")
    image = settings.image or ("" if settings.text else _declared(header, declared, "Image"))
    if not label:
        last = header[-1]
        raise DataError(
            f"data.label is empty; {path} has the columns {listed}",
            f"name the column that holds the label, for example --data.label '{last}'",
        )
    if settings.image and settings.text:
        text = ",".join(settings.text)
        problem = f"data.image = {settings.image} and data.text = {text} exclude each other"
        raise DataError(problem, "remove one of them")
    roles = {"data.label": [label], "data.client": [settings.client], "data.split": [settings.split]}
    roles |= {"data.image": [image], "data.text": [*settings.text]}
    roles |= {"data.categorical": [*settings.categorical], "data.ignore": [*settings.ignore]}
    taken = _distinct(path, header, listed, roles)
    left_out = dict.fromkeys(settings.ignore, "named by data.ignore")
    rest = [name for name in header if taken.get(name, "data.categorical") == "data.categorical"]
    if image or settings.text:
        unused = f"not read beside data.{'image' if image else 'text'}"
        left_out |= dict.fromkeys(rest, unused)
        rest = []
    else:
        left_out |= dict.fromkeys((name for name in rest if name in _INDEX), "row numbers without a name")
        rest = [name for name in rest if name not in _INDEX]
    return Columns(label, settings.client, settings.split, image, settings.text, rest, left_out)


def _declared(header: Sequence[str], declared: Mapping[str, Any], kind: str) -> str:
    """Return the one column that is declared to be of this kind, or nothing."""
    names = [name for name in header if declared.get(name, {}).get("_type") == kind]
    return names[0] if len(names) == 1 else ""


def _distinct(
    path: str, header: Sequence[str], listed: str, roles: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Return the setting that names each column; refuse unknown columns and those of two settings."""
    known = {*header}
    taken: dict[str, str] = {}
    for setting, names in roles.items():
        for name in filter(None, names):
            if name not in known:
                raise DataError(
                    f"{setting} = {name}, but {path} has the columns {listed}{nearest(name, header)}",
                    f"set --{setting} to a column of the file",
                )
            if taken.setdefault(name, setting) != setting:
                problem = f"{taken[name]} and {setting} both name the column '{name}'"
                raise DataError(problem, f"remove it from one: --{setting} OTHER_COLUMN")
    return taken


def class_names(declared: Mapping[str, Any], label: str) -> tuple[str, ...]:
    """Return the names of the classes 0, 1 and so on that a file declares, or none."""
    names = declared.get(label, {}).get("names")
    good = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if good and len({*names}) == len(names) else ()
