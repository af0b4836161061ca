"""The clients of a checkpoint: the layout of every one, and the vectors of those that have one."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from pfedmoe_mpi.checkpoint.places import FILES, ROWS, TYPE, Places, contradiction
from pfedmoe_mpi.checkpoint.sealed_file import SealedFile
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.storage.untrusted_json import UnusableError


class ClientVectors(SealedFile):
    """A sealed file with vectors of `clients` clients."""

    clients: int
    elsewhere = Places()  # of the vectors in other files

    def _load_clients(self) -> set[str]:
        """Check the clients' vectors and layouts; return the names of their datasets."""
        self._held = {self._number(name) for name in self._group("clients")}
        keys = [_client(client) for client in sorted(self._held)]
        digests = [self._check_vector(key) for key in keys]
        used = {*keys, *(f"layouts/{digest}" for digest in digests)}
        if "layouts/of_clients" not in self._ranges:
            if len(self._held) != self.clients:
                raise UnusableError(f"clients holds {len(self._held)}, but config.clients = {self.clients}")
            self._kinds, self._kind = digests, np.arange(self.clients)
            return used
        self._kind = self._numbers("layouts/of_clients")
        self._kinds = sorted(name for name in self._group("layouts") if name != "of_clients")
        if not all(map(str.isalnum, self._kinds)):
            raise UnusableError("layouts holds what is not a layout")
        in_range = (self._kind >= 0) & (self._kind < len(self._kinds))
        if len(self._kind) != self.clients or not in_range.all():
            raise UnusableError("layouts/of_clients does not give each client a layout")
        for digest in {self._kinds[kind] for kind in np.unique(self._kind).tolist()}:
            self._load_layout(digest)
            used.add(f"layouts/{digest}")
        self._load_places(used)
        for client, digest in zip(sorted(self._held), digests, strict=True):
            if self._kinds[self._kind[client]] != digest:
                raise UnusableError(f"{_client(client)} has another layout than layouts/of_clients says")
        return used | {"layouts/of_clients"}

    def _load_places(self, used: set[str]) -> None:
        """Read where the vectors of other clients lie, and add the names of these datasets."""
        if FILES not in self._ranges:
            return
        names = tuple(self._text(FILES).split("\n"))
        rows = np.asarray(self._dataset(ROWS, TYPE)[()])
        problem = contradiction(names, rows)
        clients = rows["client"]
        if (
            problem
            or not len(rows)
            or clients[-1] >= self.clients
            or not self._held.isdisjoint(clients.tolist())
        ):
            raise UnusableError(problem or f"{ROWS} names other clients than those without a vector")
        if not all(4 * self.layout(row["client"]).size == row["length"] for row in rows):
            raise UnusableError(f"{ROWS} has lengths that are not those of its clients' layouts")
        self.elsewhere = Places(names, rows)
        used |= {FILES, ROWS}

    def _number(self, name: str) -> int:
        """Return the client of a dataset's name."""
        number = int(name) if name.isascii() and name.isdigit() and len(name) < 20 else self.clients
        if number >= self.clients or f"clients/{name}" != _client(number):
            raise UnusableError(f"clients holds {name!a}, but config.clients = {self.clients}")
        return number

    def has_trained(self, client: int) -> bool:
        """Return whether a client has a vector; one that never trained has none, and begins with a draw."""
        return client in self._held or self.elsewhere.find(client) is not None

    @property
    def trained(self) -> list[int]:
        """The clients that have a vector, ascending."""
        return sorted([*self._held, *self.elsewhere.rows["client"].tolist()])

    @cached_property
    def places(self) -> Places:
        """Where all vectors lie that are not empty, those of this file included."""
        found = {}
        for client in self._held:
            one = self._ranges.get(_client(client))
            if one:
                found[client] = (one.offset, one.length, one.digest)
        return self.elsewhere.updated(Places.of(self.path.name, found))

    def vector(self, client: int) -> np.ndarray:
        """Return the private vector, float32, of a client that holds one or has none to hold.

        Raises:
            CheckpointError: its file is missing, or its bytes have changed.
        """
        row = self.places.find(client)
        assert row is not None or not self.layout(client).size, "the client never trained"
        return np.empty(0, np.float32) if row is None else self.files.read(self.places, row)

    def layout(self, client: int) -> Layout:
        """Return the layout of a client's private tensors in `vector`."""
        return self._layouts[self._kinds[self._kind[client]]]


def _client(client: int) -> str:
    """Return the path of a client's dataset."""
    return f"clients/{client:06d}"
