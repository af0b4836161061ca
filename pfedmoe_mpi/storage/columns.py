"""The numbers of clients by round, as columns: what was not measured takes no space.

A round has a column for each name, such as `accuracy`: the clients that have a value, and their values.
Packed, the columns of many rounds are four arrays, in a checkpoint and in the run folder alike:

- `columns`: JSON, a list of [name, whether the values are whole numbers].
- `entries`, int64 (E, 3): round, number of the column, and the clients that have a value. A column of whole
  numbers has an entry only in the rounds that change it.
- `clients`, int32, and `values`, float64: those of all entries, one after the other. An entry of all clients
  has no part in `clients`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pfedmoe_mpi.storage import untrusted_json
from pfedmoe_mpi.storage.untrusted_json import UnusableError

ARRAYS = {"entries": "<i8", "clients": "<i4", "values": "<f8"}  # the types of the packed arrays
_MOST_CLIENTS = 1 << 31


@dataclass(frozen=True)
class Column:
    """The values of one name in one round.

    Attributes:
        clients: those that have a value, ascending; None if all have one.
        values: theirs, float64, or int64 if they are whole numbers.
    """

    clients: np.ndarray | None
    values: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, clients: np.ndarray | None = None) -> Column:
        """Return the column of the finite `values` (n,), which are of `clients` (n,), by default all."""
        finite = np.isfinite(values)
        if clients is None and finite.all():
            return cls(None, values)
        whose = np.flatnonzero(finite) if clients is None else clients[finite]
        return cls(whose, values[finite])


NO_VALUES = Column(np.empty(0, np.int32), np.empty(0))


@dataclass(frozen=True)
class _Stretch:
    """The place of a column in packed arrays, which may be datasets of an open file."""

    clients: tuple[Any, int, int] | None
    values: tuple[Any, int, int]
    whole: bool

    def column(self, number: int) -> Column:
        """Read the column, of `number` clients in all; raise UnusableError if its clients are impossible."""
        array, start, stop = self.values
        values = np.asarray(array[start:stop])
        clients = None
        if self.clients:
            array, start, stop = self.clients
            clients = np.asarray(array[start:stop])
            if clients[0] < 0 or clients[-1] >= number or (np.diff(clients) <= 0).any():
                raise UnusableError("the clients of a measured column are not in order")
        return Column(clients, values.astype(np.int64) if self.whole else values)


class ClientColumns(Mapping[str, list[Any]]):
    """The columns of one round: a mapping from names to lists (N,), with None for clients without a value."""

    def __init__(self, clients: int, columns: Mapping[str, Column | _Stretch]) -> None:
        self.clients = clients
        self._columns = dict(columns)

    def column(self, name: str) -> Column:
        """Return a column as it is stored."""
        found = self._columns[name]
        return found if isinstance(found, Column) else found.column(self.clients)

    def array(self, name: str) -> np.ndarray:
        """Return a column as float64 (N,), with NaN for clients without a value."""
        column = self.column(name)
        if column.clients is None:
            return column.values.astype(float)
        array = np.full(self.clients, np.nan)
        array[column.clients] = column.values
        return array

    def __getitem__(self, name: str) -> list[Any]:
        column = self.column(name)
        if column.clients is None:
            return list(column.values.tolist())
        values: list[Any] = [None] * self.clients
        for client, value in zip(column.clients.tolist(), column.values.tolist(), strict=True):
            values[client] = value
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def lengths(self) -> list[int]:
        """Return the number of measured values of each column; whole numbers are not measured."""
        found = map(self.column, self)
        return [len(column.values) for column in found if column.values.dtype.kind != "i"]

    def in_memory(self) -> ClientColumns:
        """Return the same columns, which no longer depend on an open file."""
        return ClientColumns(self.clients, {name: self.column(name) for name in self})


@dataclass(frozen=True)
class Packed:
    """The columns of several rounds, as the module's docstring says; the arrays may be datasets of a file."""

    columns: Sequence[tuple[str, bool]]
    entries: np.ndarray
    clients: Any
    values: Any

    @property
    def text(self) -> str:
        """The names of the columns as JSON."""
        return json.dumps([list(column) for column in self.columns])

    def by_round(self, clients: int, rounds: Sequence[int]) -> dict[int, ClientColumns]:
        """Return the columns of each of the `rounds`, ascending, in a federation of `clients`."""
        entries: dict[tuple[int, int], _Stretch] = {}
        named = at = 0
        for round, number, count in self.entries.tolist():
            chosen = None if count == clients else (self.clients, named, named + count)
            stretch = _Stretch(chosen, (self.values, at, at + count), self.columns[number][1])
            entries[round, number] = stretch
            named, at = named + (count if chosen else 0), at + count
        kept: dict[int, Column | _Stretch] = {}
        found = {}
        for round in rounds:
            own = {}
            for number, (name, whole) in enumerate(self.columns):
                own[name] = entries.get((round, number), kept.get(number, NO_VALUES))
                if whole:
                    kept[number] = own[name]
            found[round] = ClientColumns(clients, own)
        return found

    def check(self, clients: int, last: int) -> None:
        """Check that the arrays fit each other, `clients`, and rounds up to `last`.

        Raises:
            UnusableError: they do not.
        """
        entries = self.entries
        fits = entries.ndim == 2 and entries.shape[1] == 3 and 0 < clients < _MOST_CLIENTS
        if fits and len(entries):
            round, number, count = entries.T
            order = round * len(self.columns) + number
            fits = round.min() >= 1 and round.max() <= last and (np.diff(order) > 0).all()
            fits = fits and number.min() >= 0 and number.max() < len(self.columns)
            fits = fits and count.min() >= 1 and count.max() <= clients
        if fits:
            counts = entries[:, 2]
            fits = (counts.sum(), counts[counts < clients].sum()) == (len(self.values), len(self.clients))
        if not fits:
            raise UnusableError("the measured columns do not fit their entries")

    def check_values(self, clients: int) -> None:
        """Read every value; raise UnusableError if one is not finite, or of an impossible client."""
        rounds = np.unique(self.entries[:, 0]).tolist()
        for one in self.by_round(clients, rounds).values():
            for name in one:
                if not np.isfinite(one.column(name).values).all():
                    raise UnusableError(f"the measured column {name} has values that are not finite")


def pack(rows: Sequence[Mapping[str, Any]]) -> Packed | None:
    """Return the columns of the metrics rows whose `clients` are ClientColumns; None without such a row."""
    measured = [(row["round"], row["clients"]) for row in rows if has_columns(row)]
    if not measured:
        return None
    names = list(dict.fromkeys(name for _, columns in measured for name in columns))
    whole: set[str] = set()
    entries, clients, values = [], [], []
    kept: dict[str, np.ndarray] = {}
    for round, columns in measured:
        for number, name in enumerate(names):
            column = columns.column(name) if name in columns else NO_VALUES
            if column.values.dtype.kind == "i":
                whole.add(name)
                if name in kept and np.array_equal(kept[name], column.values):
                    continue
                kept[name] = column.values
            if len(column.values):
                entries.append((round, number, len(column.values)))
                values.append(column.values)
                if column.clients is not None and len(column.clients) < columns.clients:
                    clients.append(column.clients)
    return Packed(
        [(name, name in whole) for name in names],
        np.array(entries, "<i8").reshape(-1, 3),
        np.concatenate([np.empty(0, "<i4"), *clients]).astype("<i4"),
        np.concatenate([np.empty(0, "<f8"), *values]).astype("<f8"),
    )


def has_columns(row: Mapping[str, Any]) -> bool:
    """Return whether the clients' numbers of a row are in columns, not in the row itself."""
    return isinstance(row.get("clients"), ClientColumns)


def without_columns(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row without clients' numbers that are in columns."""
    return {name: value for name, value in row.items() if name != "clients"} if has_columns(row) else row


def parse_columns(text: str) -> list[tuple[str, bool]]:
    """Return the names of packed columns, each with whether its values are whole numbers.

    Raises:
        UnusableError: it is not a list of them.
    """
    found = untrusted_json.parse(text, "columns")
    fits = isinstance(found, list) and all(
        isinstance(item, list) and [type(part) for part in item] == [str, bool] for item in found
    )
    if not fits or len({item[0] for item in found}) != len(found):
        raise UnusableError("columns is not a list of names")
    return [(name, whole) for name, whole in found]
