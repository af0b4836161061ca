"""Names of clients and classes in reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """The names of clients and of classes; empty where they have none but their numbers."""

    clients: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def client(self, client: int) -> str:
        """Return a client's name, else `client 3`."""
        return self.clients[client] if client < len(self.clients) else f"client {client}"

    def class_of(self, label: int) -> str:
        """Return a class's name, else `class 3`."""
        return self.classes[label] if label < len(self.classes) else f"class {label}"


NO_NAMES = Names()
