"""One column of a table, value by value: numbers, codes, labels, clients or images."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pfedmoe_mpi.data.sources.image_file import Embedded
from pfedmoe_mpi.data.sources.numbering import as_number, renumber
from pfedmoe_mpi.errors import DataError

CODES = 1000  # different codes of a column; one with more is a text
_LONGEST = 1000  # characters of a code, a label or a client
_KEYS = 1 << 20  # different labels or clients
_MISSING = {"", "?", "na", "n/a", "nan", "null"}  # as people and other programs write it
_LARGEST = float(np.finfo(np.float32).max)


@dataclass
class Place:
    """Where the value that is read stands: `line 3` or `row 3 of train.parquet`; columns share one place."""

    unit: str
    file: str = ""  # if the table has several
    number: int = 0

    def __str__(self) -> str:
        return f"{self.unit} {self.number}" + (f" of {self.file}" if self.file else "")


class Keys:
    """A column of labels or clients: any texts or integers, none of which may be missing."""

    def __init__(self, where: str, place: Place) -> None:
        self._where, self._place = where, place
        self._rows = array("q")
        self._met: dict[Any, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, value: Any) -> None:
        """Add the value of the place."""
        value = _strip(value)
        if is_missing(value):
            raise DataError(
                f"{self._where} is missing in {self._place}",
                "write it into the row, or remove the row",
            )
        if isinstance(value, str) and len(value) > _LONGEST:
            problem = f"{self._where} in {self._place} has more than {_LONGEST} characters"
            raise DataError(problem, "name a column of short names or numbers")
        self._rows.append(self._met.setdefault(value, len(self._met)))
        if len(self._met) > _KEYS:
            problem = f"{self._where} has more than {_KEYS:,} different values"
            raise DataError(problem, "name a column of labels or clients, not of row numbers")

    def numbered(self, given: Sequence[str] = ()) -> tuple[np.ndarray, tuple[str, ...]]:
        """Return the number of every row's value (n,) int64, and the values' names, in sorted order.

        Args:
            given: the names of the values 0, 1 and so on, if the file has them.

        Raises:
            DataError: a value that none of the `given` names belongs to; -1 is one that is missing.
        """
        places, names = renumber(self._met)
        if given:
            strange = next((n for n in names if as_number(n) not in range(len(given))), None)
            if strange is not None:
                raise DataError(
                    f"{self._where} is {strange} in a row, and the file names {len(given)} classes"
                    + (", from 0; -1 stands for a missing label" if strange == "-1" else ""),
                    "remove rows without a label; leave out a part without labels",
                )
            names = tuple(given[int(name)] for name in names)
        order = np.array([places[value] for value in self._met], np.int64)
        return order[np.frombuffer(self._rows, np.int64)], names


class Column:
    """A column of features: numbers, or codes; `coded` makes codes of numbers, too."""

    def __init__(self, name: str, where: str, place: Place, *, coded: bool) -> None:
        self._name, self._where, self._place, self._coded = name, where, place, coded
        self._numbers = array("d")
        self._codes = array("h")  # the code's place in order of appearance, -1: no code
        self._met: dict[Any, int] = {}
        self._first_number = self._first_text = self._text = ""

    def add(self, value: Any) -> None:
        """Add the value of the place."""
        value = _strip(value)
        amount, code = math.nan, -1
        if not is_missing(value):
            found = None if self._coded else _as_float(value)
            if found is None:
                code = self._code(value)
                if not self._first_text:
                    self._first_text, self._text = str(self._place), str(value)[:40]
            else:
                amount = self._checked(found, value)
                self._first_number = self._first_number or str(self._place)
        self._numbers.append(amount)
        self._codes.append(code)

    def check(self) -> None:
        """Refuse a column that holds numbers and something else."""
        if self._first_number and self._first_text:
            raise DataError(
                f"{self._where}: column '{self._name}' has numbers, but '{self._text}' in {self._first_text}",
                "correct the value; `?` or nothing for a missing value; if the column holds codes: "
                f"--data.categorical '{self._name}'; to leave it out: --data.ignore '{self._name}'",
            )

    def useless(self) -> str:
        """Return why the column cannot be a feature, or nothing."""
        if len(self._met) > CODES:
            return f"more than {CODES} different texts"
        if self._first_text:
            codes = np.frombuffer(self._codes, np.int16)
            return "the same value in every row" if (codes == codes[0]).all() else ""
        numbers = np.frombuffer(self._numbers)
        if np.isnan(numbers).all():
            return "no value in any row"
        if (numbers == numbers[0]).all():
            return "the same value in every row"
        counted = np.array_equal(numbers, numbers[0] + np.arange(len(numbers))) and len(numbers) > 2
        return "row numbers" if counted else ""

    def attribute(self) -> tuple[np.ndarray, range]:
        """Return the values (n,) float64, NaN where one is missing, and their codes, empty for a number."""
        if not self._first_text:
            return np.frombuffer(self._numbers), range(0)
        places, names = renumber(self._met)
        order = np.array([places[value] for value in self._met] + [math.nan])  # the last is that of no code
        return order[np.frombuffer(self._codes, np.int16)], range(len(names))

    def _code(self, value: Any) -> int:
        """Return the place of a code in order of appearance; those of a text column do not matter."""
        if len(self._met) > CODES:
            return 0
        return self._met.setdefault(value if not isinstance(value, str) else value[:_LONGEST], len(self._met))

    def _checked(self, found: float, value: Any) -> float:
        if not abs(found) <= _LARGEST:
            raise DataError(
                f"{self._where}, {self._place}: {self._name} = {value} is not a finite number",
                "give a number below 3.4e38; `?` or nothing for a missing value",
            )
        return found


class Images:
    """A column of images: names of files below the table's folder, or the bytes of files themselves."""

    def __init__(self, name: str, where: str, place: Place) -> None:
        self._name, self._where, self._place = name, where, place
        self.folder = Path()  # of the file that is read
        self.files: list[str | Embedded] = []

    def add(self, value: Any) -> None:
        """Add the value of the place: a name, bytes, or Hugging Face's dict of `bytes` and `path`."""
        name, content = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (value, None)
        if isinstance(name, bytes):
            name, content = None, name
        if isinstance(content, bytes):
            self.files.append(Embedded(f"{self._where}, {self._place}: {self._name}", content))
            return
        name = _strip(name)
        if not isinstance(name, str) or is_missing(name):
            problem = f"{self._where}: column '{self._name}' has no image in {self._place}"
            raise DataError(problem, "give the row the name of an image file, or remove the row")
        path = os.path.normpath(name)
        if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir or "\0" in path:
            raise DataError(
                f"{self._where}, {self._place}: the image {name!a} lies outside of the table's folder",
                f"give names that begin in {self.folder}, and move the table to a folder above all images",
            )
        self.files.append(str(self.folder / path))


def is_missing(value: Any) -> bool:
    """Return whether a value stands for none: `?`, nothing, NA, NaN, null in any case of letters, or NaN."""
    if isinstance(value, str):
        return len(value) < 5 and value.lower() in _MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def _strip(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _as_float(value: Any) -> float | None:
    """Return a number, or a text that is one, as a float; None for another text."""
    if isinstance(value, str) and "_" in value:
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:
        return math.inf
